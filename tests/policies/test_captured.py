"""A hastened policy repeats its parts from a list: the same bits as when Python runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.helpers import tiny_samples
from omega_qvla.config import preset
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.modules.captured import Captured
from omega_qvla.pack import apply_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.hasten import hasten
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from policies.tiny import PROMPTS, TINY, tiny_observation

pytestmark = pytest.mark.skipif(not isa_names(), reason="the native kernels are not built here")
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def parts(policy: Policy) -> list[Captured]:
    found = (getattr(module, "captured", None) for module in policy.module.modules())
    return [captured for captured in found if captured is not None]


def by_python(policy: Policy) -> Policy:
    for module in policy.module.modules():
        if hasattr(module, "captured"):
            setattr(module, "captured", None)  # noqa: B010 (a plain attribute, not a submodule)
    return policy


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", list(TINY))
def test_actions_have_the_same_bits(family: str, quantized: bool, tmp_path: Path) -> None:
    save_policy(TINY[family](), tmp_path / "checkpoint")
    if quantized:
        policy = load_policy(tmp_path / "checkpoint")
        quantize_policy(policy, preset("omega"), tiny_samples(2), out=tmp_path / "pack")
    policies = []
    for _ in range(2):
        policy = load_policy(tmp_path / "checkpoint")
        if quantized:
            apply_pack(policy, tmp_path / "pack", "native")
        hasten(policy)
        policies.append(policy)
    repeating, plain = policies[0], by_python(policies[1])
    for i, prompt in enumerate([PROMPTS[0], PROMPTS[1], *PROMPTS * 3]):
        seen = tiny_observation(i, prompt)
        assert np.array_equal(repeating.infer(seen, seed=i), plain.infer(seen, seed=i)), i
    assert sum(part.repeats for part in parts(repeating)) > 0
    # Two prompts at once are padded, and masked: that is not captured, nor are more steps.
    both = [tiny_observation(i, prompt) for i, prompt in enumerate(PROMPTS)]
    with torch.inference_mode():
        for _ in range(3):
            got: list[torch.Tensor] = []
            expected: list[torch.Tensor] = []
            for policy, actions in ((repeating, got), (plain, expected)):
                prefix = policy.encode(policy.prepare(both)).repeat(2)
                noise = policy.draw_noise(4, 0)
                actions += [policy.sample(prefix, noise), policy.sample(prefix, noise, 3)]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def bundled(name: str) -> tuple[Policy, Observation]:
    policy = load_policy(ASSETS / name)
    hasten(policy)
    edge = {"groot-n15-metaworld": 80, "pi05-metaworld": 80}[name]
    processor = policy.processor  # type: ignore[attr-defined]
    width = getattr(processor, "state_dim", None) or processor.config.state_dim
    images = np.random.default_rng(0).integers(0, 256, (2, edge, edge, 3), np.uint8)
    pictures = dict(zip(policy.cameras, images, strict=True))
    return policy, Observation(pictures, np.zeros(width, np.float32), "open the drawer")


@pytest.mark.parametrize("name", ["groot-n15-metaworld", "pi05-metaworld"])
def test_all_parts_of_the_bundled_policies_are_repeated(name: str) -> None:
    policy, seen = bundled(name)
    first = policy.infer(seen)
    before = [part.repeats for part in parts(policy)]
    actions = [policy.infer(seen) for _ in range(3)]
    assert all(np.array_equal(first, a) for a in actions)
    after = [part.repeats for part in parts(policy)]
    assert all(b - a >= 3 for a, b in zip(before, after, strict=True))
    assert not any(part.refused for part in parts(policy))
    # Conditioning that was computed anew, of other weights: what was captured is of no use.
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if "time_mlp_out" in name or "timestep_embedder.linear_2" in name:
                weight.mul_(0.5)
    policy.keep_conditioning()
    other = [policy.infer(seen) for _ in range(3)]
    expected = by_python(policy).infer(seen)
    assert not np.allclose(first, expected, atol=1e-4)
    assert all(np.array_equal(a, expected) for a in other)


def test_who_watches_the_language_model_sees_the_whole_prompt() -> None:
    """Of GR00T's system prompt only keys and values are kept, and its tokens run no more."""
    policy, seen = bundled("groot-n15-metaworld")
    actions = [policy.infer(seen) for _ in range(3)]
    layer = policy.module.get_submodule(
        "backbone.eagle_model.language_model.model.layers.1.mlp.up_proj"
    )
    lengths: list[int] = []
    handle = layer.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    watched = policy.infer(seen)
    handle.remove()
    with torch.inference_mode():
        assert lengths == [policy.prepare([seen]).input_ids.shape[1]]
    np.testing.assert_allclose(watched, actions[0], rtol=0, atol=1e-5)
    assert all(np.array_equal(a, actions[0]) for a in (*actions, policy.infer(seen)))
