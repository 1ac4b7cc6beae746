from __future__ import annotations

import re

import pytest
import torch

from omega_qvla.config import Rotation, Scheme, SideRecipe
from omega_qvla.errors import RecipeError
from omega_qvla.policies.base import PROTECTED, Policy
from omega_qvla.policies.targets import select_targets
from policies.tiny import TINY

DEFAULT = SideRecipe(Scheme())


@pytest.fixture(params=list(TINY))
def policy(request: pytest.FixtureRequest) -> Policy:
    built: Policy = TINY[request.param]()
    return built


def test_the_defaults_choose_what_the_published_recipe_does(policy: Policy) -> None:
    backbone = select_targets(policy, DEFAULT, "backbone")
    head = select_targets(policy, DEFAULT, "action_head")
    if policy.family == "pi05":
        # Two layers of seven; of the last one only k and v are ever run.
        assert (len(backbone), len(backbone.unused), len(head)) == (7 + 2, 5, 14)
        assert set(backbone.unused) == set(policy.unused_linears())
    else:
        assert (len(backbone), len(backbone.unused), len(head)) == (14, 0, 4 * 6)
    sites = {name for site in policy.sites() for name in site.consumers}
    assert {*backbone.names, *backbone.unused, *head.names} == sites
    assert not any(re.search(PROTECTED, name) for name in sites)


def test_true_sizes_have_the_published_counts() -> None:
    from omega_qvla.policies.groot_n15.config import GrootConfig
    from omega_qvla.policies.groot_n15.model import GrootModel
    from omega_qvla.policies.groot_n15.policy import GrootPolicy
    from omega_qvla.policies.pi05.config import Pi05Config
    from omega_qvla.policies.pi05.model import Pi05Model
    from omega_qvla.policies.pi05.policy import Pi05Policy

    published = {
        "action_dim": 32,
        "action_horizon": 50,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
    }
    with torch.device("meta"):
        pi05 = Pi05Policy(Pi05Model(Pi05Config.from_dict(published)), None)  # type: ignore[arg-type]
        groot = GrootPolicy(GrootModel(GrootConfig()), None)  # type: ignore[arg-type]
    counts = {}
    for policy in (pi05, groot):
        for side in ("backbone", "action_head"):
            chosen = select_targets(policy, DEFAULT, side)
            names = (*chosen.names, *chosen.unused)
            weights = sum(policy.module.get_submodule(n).weight.numel() for n in names)  # type: ignore[union-attr, operator]
            counts[policy.family, side] = (len(names), weights)
    assert counts == {
        ("pi05", "backbone"): (126, 1_981_808_640),
        ("pi05", "action_head"): (126, 311_427_072),
        ("groot_n15", "backbone"): (84, 603_979_776),
        ("groot_n15", "action_head"): (96, 465_567_744),
    }


@pytest.mark.parametrize("side", ["backbone", "action_head"])
def test_nothing_matched_is_an_error(policy: Policy, side: str) -> None:
    with pytest.raises(RecipeError, match="leave none"):
        select_targets(policy, SideRecipe(Scheme(), include="no_such_layer"), side)


def test_regexes_do_not_reach_the_other_side(policy: Policy) -> None:
    everything = SideRecipe(Scheme(), include=".*", exclude="")
    for side in ("backbone", "action_head"):
        chosen = select_targets(policy, everything, side, allow_protected=True)
        assert {policy.side_of(name) for name in chosen.names} == {side}
    with pytest.raises(RecipeError, match="unknown side"):
        select_targets(policy, everything, "head")


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("pi05", "action_in_proj"),
        ("pi05", "action_out_proj"),
        ("pi05", "time_mlp_in"),
        ("pi05", "time_mlp_out"),
        ("pi05", "input_layernorm.dense"),
        ("pi05", "norm.dense"),
        ("groot_n15", "timestep_encoder"),
        ("groot_n15", "norm1.linear"),
        ("groot_n15", "proj_out_1"),
        ("groot_n15", "proj_out_2"),
    ],
)
def test_small_heads_are_protected(family: str, layer: str) -> None:
    policy = TINY[family]()
    caught = SideRecipe(Scheme(), include=re.escape(layer), exclude="")
    with pytest.raises(RecipeError, match=rf"protected.*{re.escape(layer)}.*allow_protected"):
        select_targets(policy, caught, "action_head")
    allowed = select_targets(policy, caught, "action_head", allow_protected=True)
    assert allowed.names
    assert all(layer in name for name in allowed.names)


@pytest.mark.parametrize(
    "name",
    [
        "state_proj",
        "action_time_mlp_in",
        "action_head.state_encoder.layer1",
        "model.embed_tokens",
        "a.action_encoder.W1",
        "a.action_decoder.layer2",
        "x.lm_head",
        "a.layers.0.self_attn.q_norm",
    ],
)
def test_protected_names(name: str) -> None:
    assert re.search(PROTECTED, name)


def test_overrides_choose_schemes(policy: Policy) -> None:
    special = Scheme(Rotation("hadamard"))
    recipe = SideRecipe(Scheme(), overrides=((r"(o_proj|to_out\.0)$", special),))
    for name, scheme in select_targets(policy, recipe, "action_head"):
        assert (scheme is special) == name.endswith(("o_proj", "to_out.0"))
