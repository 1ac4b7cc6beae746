from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import omega_qvla.quantize as build
from calibration.helpers import all_targets, tiny_samples
from omega_qvla.calibration import Calibration, calibrate
from omega_qvla.config import Recipe, Scheme, SideRecipe, WeightScheme, preset
from omega_qvla.errors import CalibrationError, ObservationError, PackError, RecipeError
from omega_qvla.pack import merge_packs, read_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation
from omega_qvla.quantize import Progress, quantize_policy
from policies.tiny import TINY, tiny_groot, tiny_pi05

OMEGA, PAPER = preset("omega"), preset("omega-paper")


@pytest.fixture
def policy() -> Policy:
    return tiny_pi05()


def quantize(policy: Policy, out: Path, recipe: Recipe = OMEGA, **options: Any) -> Path:
    return quantize_policy(
        policy, recipe, options.pop("samples", tiny_samples()), out=out, **options
    )


@pytest.mark.parametrize("family", TINY)
def test_packs_exactly_the_targets(family: str, tmp_path: Path) -> None:
    policy = TINY[family]()
    before = {k: v.clone() for k, v in policy.module.state_dict().items()}
    manifest = read_pack(quantize(policy, tmp_path / "p")).manifest
    assert sorted(manifest.layers) == sorted(all_targets(policy))
    assert manifest.family == family
    assert manifest.recipe == OMEGA.to_dict()
    assert manifest.calibration["samples"] == [["t", 0, 4], ["t", 1, 4], ["t", 2, 4]]
    assert manifest.config["action_horizon"] == policy.action_horizon
    assert set(manifest.source) == set(before)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    after = policy.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_same_inputs_same_bytes(policy: Policy, tmp_path: Path) -> None:
    quantize(policy, tmp_path / "a", PAPER)
    quantize(tiny_pi05(), tmp_path / "b", PAPER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    quantize(policy, tmp_path / "c", PAPER, seed=1)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("family", TINY)
def test_sides_built_apart_and_merged_are_the_whole(family: str, tmp_path: Path) -> None:
    policy = TINY[family]()
    quantize(policy, tmp_path / "whole")
    parts = [
        quantize(policy, tmp_path / side, sides=[side]) for side in ("backbone", "action_head")
    ]
    merge_packs(parts, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(PackError, match="disjoint"):
        merge_packs([tmp_path / "whole", parts[0]], tmp_path / "twice")


def test_a_shared_calibration_gives_the_same_pack(policy: Policy, tmp_path: Path) -> None:
    calibration = calibrate(policy, tiny_samples(), all_targets(policy))
    loaded = Calibration.load(calibration.save(tmp_path / "c"))
    for recipe in (OMEGA, PAPER):
        name = recipe.name
        quantize(policy, tmp_path / name, recipe)
        quantize(policy, tmp_path / f"{name}2", recipe, samples=None, calibration=loaded)
        assert (tmp_path / name).read_bytes() == (tmp_path / f"{name}2").read_bytes()


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def kill_after(layers: int) -> Any:
    def progress(event: Progress) -> None:
        if event.stage == "quantizing" and event.done == layers:
            raise Killed

    return progress


def test_a_killed_build_resumes_to_the_same_bytes(policy: Policy, tmp_path: Path) -> None:
    quantize(policy, tmp_path / "whole")
    out = tmp_path / "p"
    for reached in (1, 9, 23):
        with pytest.raises(Killed):
            quantize(policy, out, progress=kill_after(reached))
        assert not out.exists()
        assert len(list((tmp_path / "p.partial").glob("layer-*"))) == reached
    (tmp_path / ".p.123.tmp").write_bytes(b"half")  # as SIGKILL in the last write would leave
    events: list[Progress] = []
    quantize(policy, out, progress=events.append)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert events == []  # everything was there already
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "whole"]


def test_resuming_quantizes_only_what_is_left(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(policy, tmp_path / "p", progress=kill_after(20))
    events: list[Progress] = []
    quantize(policy, tmp_path / "p", progress=events.append)
    assert [e.done for e in events if e.stage == "quantizing"] == [21, 22, 23]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": PAPER}, "recipe"),
        ({"policy": tiny_pi05(seed=3)}, "calibration, checkpoint"),
        ({"samples": tiny_samples(2)}, "calibration"),
        ({"seed": 1}, "calibration"),
        ({"token_cap": 5}, "calibration"),
        ({"num_steps": 4}, "calibration, num_steps"),
        ({"sides": ["backbone"]}, "layers, recipe"),
    ],
)
def test_work_of_another_build_is_not_gone_on_with(
    policy: Policy, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(Killed):
        quantize(policy, tmp_path / "p", progress=kill_after(2))
    arguments = {"policy": policy, **change}
    with pytest.raises(PackError, match=rf"another build \({named} differ\).*delete"):
        quantize(out=tmp_path / "p", **arguments)
    if named == "calibration":
        quantize(out=tmp_path / "p", resume=False, **arguments)
        assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_statistics_of_another_content_are_noticed(policy: Policy, tmp_path: Path) -> None:
    calibration = calibrate(policy, tiny_samples(1), all_targets(policy))
    name = all_targets(policy)[0]
    stats = dataclasses.replace(calibration.stats[name], count=7)
    changed = Calibration({**calibration.stats, name: stats}, calibration.provenance)
    with pytest.raises(Killed):
        quantize(policy, tmp_path / "p", samples=None, calibration=changed, progress=kill_after(2))
    with pytest.raises(PackError, match=r"another build \(statistics differ\)"):
        quantize(policy, tmp_path / "p", samples=None, calibration=calibration)


def test_layers_without_their_binding_are_not_trusted(policy: Policy, tmp_path: Path) -> None:
    quantize(policy, tmp_path / "whole")
    with pytest.raises(Killed):
        quantize(policy, tmp_path / "p", PAPER, progress=kill_after(2))
    (tmp_path / "p.partial" / "build.json").unlink()
    quantize(policy, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_damaged_partial_layer_is_named(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(policy, tmp_path / "p", progress=kill_after(2))
    file = tmp_path / "p.partial" / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PackError, match=r"layer-00001\.safetensors.*truncated"):
        quantize(policy, tmp_path / "p")


def test_a_failure_leaves_no_pack_and_an_old_one_alone(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantize(policy, tmp_path / "p", preset("rtn"), samples=None)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise PackError("disk full")

    monkeypatch.setattr(build.policy, "write_pack", full)
    with pytest.raises(PackError, match="disk full"):
        quantize(policy, out)
    assert out.read_bytes() == before


def test_recipes_without_need_take_no_samples(policy: Policy, tmp_path: Path) -> None:
    out = quantize(policy, tmp_path / "a", preset("rtn"), samples=None)
    assert read_pack(out).manifest.calibration == {}
    quantize(policy, tmp_path / "b", preset("rtn"))
    assert out.read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(CalibrationError, match="needs calibration"):
        quantize(policy, tmp_path / "c", samples=None)


def test_a_gptq_layer_without_statistics(policy: Policy, tmp_path: Path) -> None:
    names = all_targets(policy)
    calibration = calibrate(policy, tiny_samples(), names[:-1])
    with pytest.raises(CalibrationError, match=f"layer {names[-1]}: .*Hessian"):
        quantize(policy, tmp_path / "p", samples=None, calibration=calibration)
    assert not (tmp_path / "p").exists()


def test_a_calibration_that_misses_a_step(policy: Policy, tmp_path: Path) -> None:
    calibration = calibrate(policy, tiny_samples(1), all_targets(policy))
    victim = all_targets(policy)[-1]
    stats = calibration.stats[victim]
    for tokens in (stats.tokens[:9], (*stats.tokens[:9], stats.tokens[9][:0])):
        holed = {**calibration.stats, victim: dataclasses.replace(stats, tokens=tokens)}
        given = Calibration(holed, calibration.provenance)
        with pytest.raises(CalibrationError, match=f"layer {victim}.*step"):
            quantize(policy, tmp_path / "p", PAPER, samples=None, calibration=given, resume=False)
    assert not (tmp_path / "p").exists()


def test_a_calibration_of_something_else(policy: Policy, tmp_path: Path) -> None:
    names = all_targets(policy)
    other = calibrate(tiny_pi05(seed=4), tiny_samples(1), names)
    with pytest.raises(CalibrationError, match="another checkpoint"):
        quantize(policy, tmp_path / "p", samples=None, calibration=other)
    short = calibrate(policy, tiny_samples(1), names, num_steps=4)
    with pytest.raises(CalibrationError, match="for 4 denoising steps, the build for 10"):
        quantize(policy, tmp_path / "p", samples=None, calibration=short)
    with pytest.raises(CalibrationError, match="other samples"):
        quantize(policy, tmp_path / "p", calibration=calibrate(policy, tiny_samples(1), names))


def one_side(include: str, **options: Any) -> Recipe:
    return Recipe("r", None, SideRecipe(Scheme(), include=include), **options)


def test_recipes_that_match_nothing_or_too_much(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave none of the"):
        quantize(policy, tmp_path / "p", one_side("no_such_layer"))
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in"):
        with pytest.raises(RecipeError, match=f"protected.*{name}"):
            quantize(policy, tmp_path / "p", one_side(name))
    allowed = one_side("action_in_proj", allow_protected=True)
    assert set(read_pack(quantize(policy, tmp_path / "p", allowed)).layers) == {"action_in_proj"}
    with pytest.raises(RecipeError, match="leaves the backbone as it is"):
        quantize(policy, tmp_path / "q", allowed, sides=["backbone"])
    with pytest.raises(RecipeError, match="unknown side 'tail'"):
        quantize(policy, tmp_path / "q", sides=["tail"])
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_observations_that_the_policy_refuses(policy: Policy, tmp_path: Path) -> None:
    good = tiny_samples(1)
    first = good.observations[0]
    nan = Observation(first.images, first.state * float("nan"), first.prompt)
    blind = Observation({"base": first.images["base"]}, first.state, first.prompt)
    for bad in (nan, blind):
        samples = dataclasses.replace(good, observations=(bad,))
        with pytest.raises(ObservationError):
            quantize(policy, tmp_path / "p", samples=samples, resume=False)
    assert not (tmp_path / "p").exists()


def test_cross_attention_keys_of_groot_have_one_row(tmp_path: Path) -> None:
    policy = tiny_groot()
    layers = read_pack(quantize(policy, tmp_path / "p", PAPER)).layers
    outside = [name for name in policy.step_independent_linears() if name in layers]
    assert len(outside) == 4  # to_k and to_v of two cross-attention blocks
    for name, layer in layers.items():
        inside = layer.side == "action_head" and name not in outside
        assert layer.num_steps == (policy.num_steps if inside else None)
        table = layer.act_scale
        assert table is not None
        assert len(table) == (policy.num_steps if inside else 1), name


def test_per_layer_overrides(policy: Policy, tmp_path: Path) -> None:
    fine = Scheme(weight=WeightScheme(group=32))
    side = SideRecipe(Scheme(), overrides=((r"mlp\.down_proj", fine),))
    out = quantize(policy, tmp_path / "p", Recipe("r", None, side), samples=None)
    groups = {n: layer.weight_scale.shape[1] for n, layer in read_pack(out).layers.items()}
    assert {n for n, count in groups.items() if count > 1} == {n for n in groups if "down" in n}


@pytest.mark.parametrize("family", TINY)
def test_layers_that_share_an_input_share_the_smoothing(family: str, tmp_path: Path) -> None:
    policy = TINY[family]()
    layers = read_pack(quantize(policy, tmp_path / "p")).layers
    shared = 0
    for site in policy.sites():
        divisors = [layers[n].smooth for n in site.consumers if n in layers]
        found = [d for d in divisors if d is not None]
        assert len(found) == len(divisors)
        for divisor in found[1:]:
            # GR00T's last block reads fewer queries than keys: its to_q has its own profile.
            equal = torch.equal(divisor, found[0])
            last = "to_q" in site.consumers[0] and not equal
            assert equal or last, site.consumers
            shared += equal
    assert shared > 0
