"""The native pi0.5 against recordings of openpi's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from omega_qvla.policies.hasten import hasten_module
from omega_qvla.policies.pi05.config import IMAGE_SLOTS, GemmaConfig, Pi05Config, SiglipConfig
from omega_qvla.policies.pi05.model import Pi05Model, Prefix

from .conftest import Case, assert_close

pytestmark = pytest.mark.cases("pi05")


def config_of(case: Case) -> Pi05Config:
    data = case.meta["config"]
    vision = {k: v for k, v in data["lab"]["vision"].items() if k != "projection_dim"}
    return Pi05Config(
        vision=SiglipConfig(**vision),
        vlm=GemmaConfig(**data["vlm"]),
        expert=GemmaConfig(**data["expert"]),
        vocab_size=data["lab"]["vocab_size"],
        action_dim=data["action_dim"],
        action_horizon=data["action_horizon"],
        max_token_len=data["max_token_len"],
        image_slots=tuple(s for s in IMAGE_SLOTS if f"in.image.{s}" in case.tensors),
    )


@dataclass(frozen=True)
class Loaded:
    """A case, the model with its weights, and the arguments of `encode_prefix`."""

    case: Case
    model: Pi05Model
    prefix_args: tuple[list[Tensor], list[Tensor], Tensor, Tensor]

    def recorded(self, start: str) -> dict[str, Tensor]:
        """Recorded outputs `out.<start><rest>` by <rest>."""
        start = f"out.{start}"
        return {k[len(start) :]: v for k, v in self.case.tensors.items() if k.startswith(start)}

    def full_mask(self) -> Tensor:
        return self.case.tensors["out.prefix_pad_mask"]


@pytest.fixture(scope="module", params=["torch", "hastened"])
def loaded(request: pytest.FixtureRequest, case: Case) -> Loaded:
    config = config_of(case)
    with torch.device("meta"):
        model = Pi05Model(config)
    unused = case.meta.get("tied_or_unused", {})
    weights = {name: w for name, w in case.weights().items() if name not in unused}
    model.load_state_dict(weights, assign=True)
    t = case.tensors
    if request.param == "hastened":
        hasten_module(model)
    images = [t[f"in.image.{slot}"] for slot in config.image_slots]
    masks = [t[f"in.image_mask.{slot}"] for slot in config.image_slots]
    args = (images, masks, t["in.lang_tokens"], t["in.lang_mask"])
    return Loaded(case, model.eval().requires_grad_(False), args)


@pytest.fixture(scope="module")
def prefix(loaded: Loaded) -> Prefix:
    return loaded.model.encode_prefix(*loaded.prefix_args)


def valid(x: Tensor, mask: Tensor) -> Tensor:
    """The valid positions of x [B, S, ...] in order, with or without the trimmed ones."""
    return x[mask]


def test_vision(loaded: Loaded) -> None:
    for slot, expected in loaded.recorded("vision_last_hidden.").items():
        image = loaded.case.tensors[f"in.image.{slot}"]
        assert_close(loaded.model.vision(image), expected, f"vision {slot}")


@pytest.mark.parametrize("trim", [True, False])
def test_prefix_embeddings(loaded: Loaded, trim: bool) -> None:
    embeddings, mask = loaded.model.embed_prefix(*loaded.prefix_args, trim=trim)
    if not trim:
        assert torch.equal(mask, loaded.full_mask())
    expected = valid(loaded.case.tensors["out.prefix_embs"], loaded.full_mask())
    assert_close(valid(embeddings, mask), expected, "prefix embeddings")


@pytest.mark.parametrize("trim", [True, False])
def test_prefix_cache(loaded: Loaded, trim: bool) -> None:
    prefix = loaded.model.encode_prefix(*loaded.prefix_args, trim=trim)
    for what, ours in (("prefix_k.", prefix.keys), ("prefix_v.", prefix.values)):
        recorded = loaded.recorded(what)
        assert recorded
        for layer, theirs in recorded.items():
            actual = valid(ours[int(layer)].transpose(1, 2), prefix.pad_mask)
            expected = valid(theirs.transpose(1, 2), loaded.full_mask())
            assert_close(actual, expected, what + layer)


def test_prefix_hidden_state(loaded: Loaded) -> None:
    model = loaded.model
    embeddings, mask = model.embed_prefix(*loaded.prefix_args, trim=False)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -1e30)[:, None, None]
    _, _, hidden = model.language_model(embeddings, model.prefix_rope(mask), bias, full=True)
    expected = loaded.case.tensors["out.prefix_final_hidden"]
    assert_close(valid(hidden, mask), valid(expected, mask), "prefix hidden state")


def test_positions(loaded: Loaded, prefix: Prefix) -> None:
    mask = loaded.full_mask()
    positions = loaded.case.tensors["out.prefix_position_ids"]
    assert torch.equal((prefix.pad_mask.cumsum(1) - 1)[prefix.pad_mask], positions[mask])
    suffix = loaded.case.tensors["out.suffix_position_ids"]
    assert torch.equal(prefix.num_valid[:, None] + torch.arange(suffix.shape[1]), suffix)


def test_time_grid_is_bit_exact(loaded: Loaded) -> None:
    expected = loaded.case.tensors["out.time"]
    assert torch.equal(loaded.model.time_grid(len(expected)), expected)


def test_conditioning(loaded: Loaded) -> None:
    cond = loaded.model.time_embedding(loaded.case.tensors["out.time"])
    expected = loaded.case.tensors["out.adarms_cond"]
    assert_close(cond[:, None].expand_as(expected), expected, "adaRMS condition")


def test_suffix_embeddings(loaded: Loaded) -> None:
    t = loaded.case.tensors
    actual = loaded.model.action_in_proj(t["in.noise"])
    assert_close(actual, t["out.suffix_embs_step0"], "suffix embeddings")


def test_suffix_hidden_state(loaded: Loaded, prefix: Prefix) -> None:
    t, seen = loaded.case.tensors, []
    model = loaded.model
    handle = model.expert.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.velocity(prefix, t["in.noise"], model.conditioning(t["out.time"][:1]))
    handle.remove()
    assert_close(seen[0], t["out.suffix_final_hidden_step0"], "suffix hidden state")


def test_velocity_of_every_step(loaded: Loaded, prefix: Prefix) -> None:
    t, model = loaded.case.tensors, loaded.model
    cond = model.conditioning(t["out.time"])
    for s, (x_t, v_t) in enumerate(zip(t["out.x_t"], t["out.v_t"], strict=True)):
        assert_close(model.velocity(prefix, x_t, cond.step(s)), v_t, f"v_t of step {s}")


def test_trajectory(loaded: Loaded, prefix: Prefix) -> None:
    t, model = loaded.case.tensors, loaded.model
    cond = model.conditioning(t["out.time"])
    x_t, total = t["in.noise"], len(t["out.time"])
    for s, expected in enumerate(t["out.x_t"]):
        assert_close(x_t, expected, f"x_t of step {s}")
        x_t = x_t - model.velocity(prefix, x_t, cond.step(s)) / total


def test_actions(loaded: Loaded, prefix: Prefix) -> None:
    noise = loaded.case.tensors["in.noise"]
    recorded = loaded.recorded("actions_")
    assert recorded
    for steps, expected in recorded.items():
        actions = loaded.model.sample_actions(prefix, noise, int(steps))
        assert_close(actions, expected, f"actions of {steps} steps")


def test_actions_on_the_recorded_times(loaded: Loaded, prefix: Prefix) -> None:
    t = loaded.case.tensors
    expected = loaded.recorded("actions_").get(str(len(t["out.time"])))
    if expected is None:
        pytest.skip("no actions were recorded for the recorded times")
    actions = loaded.model.sample_actions(prefix, t["in.noise"], time_grid=t["out.time"])
    assert_close(actions, expected, "actions")


def test_joint_training_path(loaded: Loaded, prefix: Prefix) -> None:
    noise = loaded.case.tensors["in.noise"]
    for time, expected in loaded.recorded("v_joint_t").items():
        cond = loaded.model.conditioning(torch.full((len(noise),), float(time)))
        assert_close(loaded.model.velocity(prefix, noise, cond), expected, f"v at t={time}")
