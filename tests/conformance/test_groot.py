"""The native GR00T N1.5, backbone and action head, against recordings of the original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.policies.groot_n15.action_head import ActionHead, Prefix
from omega_qvla.policies.groot_n15.config import ActionHeadConfig, BackboneConfig, EagleConfig
from omega_qvla.policies.groot_n15.eagle import EagleBackbone
from omega_qvla.policies.hasten import hasten_module

from .conftest import Case, assert_close

heads = pytest.mark.cases("groot_head")
eagles = pytest.mark.cases("eagle")


def load(case: Case, model: nn.Module) -> nn.Module:
    """Give `model` (on the meta device) the case's weights, less the unused pooling head."""
    unused = "eagle_model.vision_model.vision_model.head."
    weights = {k: w for k, w in case.weights().items() if not k.startswith(unused)}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what each module returns, by name, in order."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class HeadCase:
    """A case, the head with its weights, and the encoded observation."""

    case: Case
    head: ActionHead
    prefix: Prefix

    def step_counts(self) -> list[int]:
        names = [k.split(".") for k in self.case.tensors if k.startswith("out.n")]
        return sorted({int(parts[1][1:]) for parts in names if len(parts) == 3})

    def recorded(self, steps: int, what: str) -> Tensor:
        return self.case.tensors[f"out.n{steps}.{what}"]


@pytest.fixture(scope="module", params=["torch", "hastened"])
def head_case(request: pytest.FixtureRequest, case: Case) -> HeadCase:
    with torch.device("meta"):
        head = ActionHead(ActionHeadConfig.from_dict(case.meta["config"]))
    load(case, head)
    if request.param == "hastened":
        hasten_module(head)
    t = case.tensors
    prefix = head.encode_features(t["in.backbone_features"], t["in.state"], t["in.embodiment_id"])
    return HeadCase(case, head, prefix)


@heads
def test_observation_features(head_case: HeadCase) -> None:
    t, prefix = head_case.case.tensors, head_case.prefix
    expected = t["out.vl_embs"]  # some files keep the first tokens only
    assert_close(prefix.vl[:, : expected.shape[1]], expected, "vl_embs")
    assert_close(prefix.state_features, t["out.state_features"], "state_features")


@heads
def test_timesteps(head_case: HeadCase) -> None:
    assert head_case.step_counts()
    for steps in head_case.step_counts():
        expected = head_case.recorded(steps, "timesteps")
        assert torch.equal(head_case.head.buckets(steps), expected)


@heads
def test_time_embedding(head_case: HeadCase) -> None:
    # The file does not say which step count it was recorded with: the first listed.
    expected = head_case.case.tensors["out.temb_step1"]
    buckets = head_case.recorded(head_case.step_counts()[0], "timesteps")
    temb = head_case.head.model.timestep_encoder(buckets, torch.float32)
    assert_close(temb[1:2].expand_as(expected), expected, "temb of step 1")


@heads
def test_inside_of_step_0(head_case: HeadCase) -> None:
    t, head, prefix = head_case.case.tensors, head_case.head, head_case.prefix
    step = head.step_conditioning(head_case.step_counts()[0]).at(0)
    tokens = head.tokens(prefix, t["in.noise"], step.tau)
    assert_close(tokens, t["out.sa_embs_step0"], "sa_embs")
    blocks = {str(i): block for i, block in enumerate(head.model.transformer_blocks)}
    with outputs_of(blocks) as seen:
        out = head.model(tokens, prefix.key_values, step)
    recorded = [k for k in t if k.startswith("out.block") and k.endswith("_step0")]
    assert recorded
    for key in recorded:
        index = key.removeprefix("out.block").removesuffix("_step0")
        assert_close(seen[index][0], t[key], key)
    assert_close(out, t["out.dit_out_step0"], "dit_out")


@heads
def test_velocity_of_every_step(head_case: HeadCase) -> None:
    for steps in head_case.step_counts():
        conditioning = head_case.head.step_conditioning(steps)
        pairs = zip(
            head_case.recorded(steps, "x_t"), head_case.recorded(steps, "velocity"), strict=True
        )
        for s, (x_t, expected) in enumerate(pairs):
            velocity = head_case.head.velocity(head_case.prefix, x_t, conditioning.at(s))
            assert_close(velocity, expected, f"velocity of step {s} of {steps}")


@heads
def test_trajectory(head_case: HeadCase) -> None:
    """Running freely from the noise, every x_t and the actions."""
    noise = head_case.case.tensors["in.noise"]
    for steps in head_case.step_counts():
        conditioning, x_t = head_case.head.step_conditioning(steps), noise
        for s, expected in enumerate(head_case.recorded(steps, "x_t")):
            assert_close(x_t, expected, f"x_t of step {s} of {steps}")
            x_t = x_t + head_case.head.velocity(head_case.prefix, x_t, conditioning.at(s)) / steps
        actions = head_case.head.sample_actions(head_case.prefix, noise, steps)
        assert_close(actions, head_case.recorded(steps, "actions"), f"actions of {steps} steps")
        assert_close(actions, x_t, "sample_actions against the steps")


@heads
def test_per_sample_times_and_repeats(head_case: HeadCase) -> None:
    """The training path: all recorded steps as one batch of noise samples per observation."""
    head, prefix = head_case.head, head_case.prefix
    for steps in head_case.step_counts():
        x_t = head_case.recorded(steps, "x_t").transpose(0, 1).flatten(0, 1)
        buckets = head_case.recorded(steps, "timesteps").repeat(prefix.batch)
        velocity = head.velocity(prefix.repeat(steps), x_t, head.conditioning(buckets))
        expected = head_case.recorded(steps, "velocity").transpose(0, 1).flatten(0, 1)
        assert_close(velocity, expected, f"{steps} steps at once")


@dataclass(frozen=True)
class EagleCase:
    """A case and the backbone with its weights."""

    case: Case
    backbone: EagleBackbone

    def valid(self, x: Tensor) -> Tensor:
        """The positions of x [B, L, ...] that are no padding."""
        return x[self.case.tensors["in.attention_mask"].bool()]


@pytest.fixture(scope="module", params=["torch", "hastened"])
def eagle_case(request: pytest.FixtureRequest, case: Case) -> EagleCase:
    meta = case.meta
    keys = ("select_layer", "project_to_dim")
    with torch.device("meta"):
        backbone = EagleBackbone(
            EagleConfig.from_dict(meta["config"]),
            BackboneConfig.from_dict({k: meta[k] for k in keys}),
        )
    load(case, backbone)
    if request.param == "hastened":
        hasten_module(backbone)
    return EagleCase(case, backbone)


@eagles
def test_vision(eagle_case: EagleCase) -> None:
    t, eagle = eagle_case.case.tensors, eagle_case.backbone.eagle_model
    with outputs_of({"vision": eagle.vision_model}) as seen:
        images = eagle.image_tokens(t["in.pixel_values"])
    assert_close(seen["vision"][0], t["out.vision_last_hidden"], "vision_last_hidden")
    assert_close(images, t["out.vit_embeds"], "vit_embeds")
    assert images.shape[1] == eagle.config.tokens_per_image


@eagles
def test_language_model(eagle_case: EagleCase) -> None:
    t, backbone, valid = eagle_case.case.tensors, eagle_case.backbone, eagle_case.valid
    language = backbone.eagle_model.language_model
    embeddings = backbone.eagle_model.embed(t["in.pixel_values"], t["in.input_ids"])
    assert_close(valid(embeddings), valid(t["out.inputs_embeds"]), "inputs_embeds")
    layers = {"first": language.model.layers[0], "last": language.model.layers[-1]}
    with outputs_of(layers) as seen:
        features = backbone(t["in.pixel_values"], t["in.input_ids"], t["in.attention_mask"])
    assert_close(valid(seen["first"][0]), valid(t["out.hidden_after_layer1"]), "layer 1")
    assert_close(valid(seen["last"][0]), valid(t["out.last_layer_before_norm"]), "last layer")
    assert_close(valid(features), valid(t["out.backbone_features"]), "backbone_features")


@eagles
def test_without_a_mask(eagle_case: EagleCase) -> None:
    """Observations one by one, padding removed, no mask: the path of inference."""
    t, backbone = eagle_case.case.tensors, eagle_case.backbone
    tokens, first = backbone.eagle_model.config.tokens_per_image, 0
    for b, keep in enumerate(t["in.attention_mask"].bool()):
        ids = t["in.input_ids"][b, keep][None]
        images = int((ids == backbone.eagle_model.config.image_token_index).sum()) // tokens
        features = backbone(t["in.pixel_values"][first : first + images], ids)
        first += images
        assert_close(features[0], t["out.backbone_features"][b, keep], f"observation {b}")
