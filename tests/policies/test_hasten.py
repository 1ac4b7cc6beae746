"""A hastened policy acts as before; a block run whole has the bits of its parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.helpers import tiny_samples
from omega_qvla.config import preset
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.modules.dense import DenseLinear
from omega_qvla.pack import apply_pack
from omega_qvla.policies import hasten as hastening
from omega_qvla.policies.base import Policy
from omega_qvla.policies.groot_n15.dit import DiTBlock
from omega_qvla.policies.groot_n15.qwen3 import Qwen3Layer
from omega_qvla.policies.groot_n15.vl_self_attention import SelfAttentionBlock
from omega_qvla.policies.hasten import hasten
from omega_qvla.policies.pi05.gemma import ExpertLayer
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.policies.siglip import SiglipLayer
from omega_qvla.quantize import quantize_policy
from policies.tiny import PROMPTS, TINY, tiny_observation

native = pytest.mark.skipif(not isa_names(), reason="the native kernels are not built here")


@pytest.fixture(params=list(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """family -> folder with `checkpoint` and `pack`."""
    folders = {}
    for name, make in TINY.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        save_policy(make(), folder / "checkpoint")
        policy = load_policy(folder / "checkpoint")
        quantize_policy(policy, preset("omega"), tiny_samples(2), out=folder / "pack")
    yield folders


def velocities(policy: Policy, repeats: int = 1, prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    """Actions for one observation per prompt (the second is shorter: padding), each sampled
    `repeats` times."""
    observations = [tiny_observation(i, prompt) for i, prompt in enumerate(prompts)]
    with torch.inference_mode():
        prefix = policy.encode(policy.prepare(observations)).repeat(repeats)
        return policy.sample(prefix, policy.draw_noise(len(prompts) * repeats, 0))


@pytest.mark.parametrize("repeats, prompts", [(1, PROMPTS[:1]), (3, PROMPTS[:1]), (2, PROMPTS)])
def test_the_actions_are_those_of_before(
    family: str, repeats: int, prompts: tuple[str, ...]
) -> None:
    policy, hastened = TINY[family](), TINY[family]()
    hasten(hastened)
    before, after = (velocities(p, repeats, prompts) for p in (policy, hastened))
    assert not torch.equal(before, after) or not isa_names()  # the other kernels did run
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_kept_conditioning_is_the_computed_one_and_serves_its_steps_only(family: str) -> None:
    policy, plain = TINY[family](), TINY[family]()
    policy.keep_conditioning()
    assert torch.equal(velocities(policy), velocities(plain))
    with torch.inference_mode():
        prefix = policy.encode(policy.prepare([tiny_observation()]))
        noise = policy.draw_noise(1, 0)
        steps = policy.num_steps + 3
        assert torch.equal(policy.sample(prefix, noise, steps), plain.sample(prefix, noise, steps))


Whole = ExpertLayer | DiTBlock | Qwen3Layer | SiglipLayer | SelfAttentionBlock
# Bits of a block in full precision are its own: it multiplies with kernels of its own.
QUANTIZED = ExpertLayer | DiTBlock | Qwen3Layer


def blocks(policy: Policy, kinds: Any = Whole) -> list[Any]:
    return [m for m in policy.module.modules() if isinstance(m, kinds)]


def counted(found: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whole calls of each block that went through, from now on."""
    calls = [0] * len(found)

    def counting(i: int, whole: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            done = whole(*args, **options)
            calls[i] += done is not None
            return done

        return call

    for i, block in enumerate(found):
        monkeypatch.setattr(block, "whole", counting(i, block.whole))
    return calls


@native
@pytest.mark.parametrize("repeats", [1, 3])
def test_whole_blocks_have_the_bits_of_their_parts(
    built: dict[str, Path], family: str, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the DiT's last block, which asks for fewer queries. Its to_q was calibrated on
    other tokens than to_k, so that their inputs do not agree: it is a product of its own."""
    policy = load_policy(built[family] / "checkpoint")
    apply_pack(policy, built[family] / "pack", "native")
    hasten(policy)
    assert all(block.whole is not None for block in blocks(policy))
    calls = counted(blocks(policy, QUANTIZED), monkeypatch)
    whole = velocities(policy, repeats, PROMPTS[:1])
    # The language model runs once for the beginning of the prompt, once for the rest.
    assert calls == [policy.num_steps if isinstance(b, ExpertLayer | DiTBlock) else 2
                     for b in blocks(policy, QUANTIZED)]  # fmt: skip
    assert torch.equal(velocities(policy, repeats, PROMPTS[:1]), whole)
    assert calls == [2 * policy.num_steps if isinstance(b, ExpertLayer | DiTBlock) else 3
                     for b in blocks(policy, QUANTIZED)]  # fmt: skip
    for block in blocks(policy, QUANTIZED):
        block.whole = None
    assert torch.equal(velocities(policy, repeats, PROMPTS[:1]), whole)


@native
def test_native_and_emulated_stay_as_near_as_they_were(built: dict[str, Path], family: str) -> None:
    actions = []
    for backend in ("native", "emulated"):
        policy = load_policy(built[family] / "checkpoint")
        apply_pack(policy, built[family] / "pack", backend)
        hasten(policy)
        actions.append(policy.infer(tiny_observation()))
    np.testing.assert_allclose(actions[0], actions[1], rtol=0, atol=1e-4)


@native
def test_a_watched_layer_inside_a_whole_block_is_seen(built: dict[str, Path], family: str) -> None:
    policy = load_policy(built[family] / "checkpoint")
    apply_pack(policy, built[family] / "pack", "native")
    hasten(policy)
    expected = velocities(policy)
    block = blocks(policy, ExpertLayer | DiTBlock)[0]
    layer = block.mlp.up_proj if isinstance(block, ExpertLayer) else block.ff.net[0].proj
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(out))
    assert torch.equal(velocities(policy), expected)
    assert len(seen) == policy.num_steps
    handle.remove()
    assert torch.equal(velocities(policy), expected) and len(seen) == policy.num_steps


@native
def test_blocks_in_full_precision_are_whole_where_they_are_small(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, larger = TINY[family](), TINY[family]()
    hasten(policy)
    assert all(block.whole is not None for block in blocks(policy))
    monkeypatch.setattr("omega_qvla.modules.block.SMALL", 1000)
    monkeypatch.setattr("omega_qvla.kernels.dense.SMALL", 1000)
    hasten(larger)
    assert all(block.whole is None for block in blocks(larger))


@native
def test_a_block_in_full_precision_leaves_gradients_to_torch(family: str) -> None:
    policy = TINY[family]()
    hasten(policy)
    block = blocks(policy, SiglipLayer)[0]
    block.requires_grad_(True)
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    y = block(x)
    y.sum().backward()
    assert block.mlp.fc1.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(block(x), y.detach(), rtol=0, atol=1e-5)


def test_an_unbuilt_machine_is_as_slow_as_before(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiled kernels and oneDNN, hastening changes nothing at all."""
    policy, plain = TINY[family](), TINY[family]()
    monkeypatch.setattr("omega_qvla.kernels.rows.compiled", lambda: None)
    monkeypatch.setattr("omega_qvla.modules.dense.onednn_available", lambda: False)
    hasten(policy)
    assert not any(isinstance(m, DenseLinear) for m in policy.module.modules())
    assert torch.equal(velocities(policy), velocities(plain))


def test_another_device_is_left_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, touched = TINY[family](), []
    monkeypatch.setattr(hastening, "hasten_module", touched.append)
    monkeypatch.setattr(type(policy), "device", torch.device("cuda"), raising=False)
    hasten(policy)
    assert not touched


def test_kept_time_serves_every_embodiment() -> None:
    """The action encoder's share of the time is kept per embodiment, also for mixed batches."""
    policy, plain = TINY["groot_n15"](), TINY["groot_n15"]()
    policy.keep_conditioning()
    head = policy.module.action_head
    kinds = head.config.max_num_embodiments
    assert kinds > 1 and head.kept[0].time.shape[:2] == (kinds, 1)
    inputs = policy.prepare([tiny_observation(i) for i in range(kinds)])
    for ids in (torch.tensor([kinds - 1]), torch.arange(kinds)):
        made = []
        for which in (policy, plain):
            with torch.inference_mode():
                prefix = which.encode(replace(inputs, embodiment_id=ids)).repeat(2)
                made.append(which.sample(prefix, which.draw_noise(2 * kinds, 0)))
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)


def test_the_tokens_of_an_instruction_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = TINY["groot_n15"]().processor
    first, _ = processor.tokenize(PROMPTS)
    asked: list[str] = []
    processor.tokenizer = _Recording(processor.tokenizer, asked)
    again, _ = processor.tokenize(PROMPTS)
    assert torch.equal(first, again) and not asked
    monkeypatch.setattr("omega_qvla.policies.groot_n15.processor.KEPT_PROMPTS", 1)
    processor.tokenize(["another one"])
    assert len(asked) == 1 and torch.equal(processor.tokenize(PROMPTS)[0], first)
    assert len(asked) == 3 and len(processor._ids) == 1


class _Recording:
    """A tokenizer that writes down what it is asked."""

    def __init__(self, inner: Any, asked: list[str]) -> None:
        self._inner, self._asked = inner, asked

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        self._asked.append(text)
        return self._inner.encode(text, add_special_tokens=add_special_tokens)


@native
def test_one_embodiment_has_its_own_small_product() -> None:
    head, plain = (TINY["groot_n15"]().module.action_head for _ in range(2))
    hastening.hasten_module(head)
    kinds = head.config.max_num_embodiments
    with torch.no_grad():
        x = torch.randn(2, 4, head.config.action_dim, generator=torch.Generator().manual_seed(0))
        tau = torch.randn(1, head.model.width, generator=torch.Generator().manual_seed(1))
        for kind in range(kinds):
            ids = torch.tensor([kind])
            mine, others = (h.action_encoder.select(ids) for h in (head, plain))
            assert all(w.small is not None for w in mine)
            assert all(w.small is None for w in others)
            again = head.action_encoder.select(ids)
            assert all(a.small is b.small for a, b in zip(mine, again, strict=True))
            found, expected = (
                h.action_encoder.apply_selected(x, tau, w)
                for h, w in ((head, mine), (plain, others))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        mixed = head.action_encoder.select(torch.arange(kinds))
        assert all(w.small is None for w in mixed)
    assert all(w.small is None for w in head.action_encoder.select(torch.tensor([0])))  # gradients


def test_kept_rotary_tables_are_the_computed_ones() -> None:
    """Also for masked tokens in front and for more positions than before."""
    model, plain = (TINY["pi05"]().module for _ in range(2))
    model.fast = True
    for length in (5, 9, 7):
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, 2], mask[1, :2] = False, False
        found, expected = model.prefix_rope(mask), plain.prefix_rope(mask)
        for a, b in zip(found, expected, strict=True):
            assert a.is_contiguous() and a.shape == b.shape
            torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=1e-6)
        kept = model._angles[model.config.vlm.head_dim]
        assert kept.cos.shape[1] == {5: 5, 9: 9, 7: 9}[length]


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
long regions = 0;
void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags) {
  static void (*real)(void (*)(void*), void*, unsigned, unsigned);
  if (!real) real = dlsym(RTLD_NEXT, "GOMP_parallel");
  ++regions;
  real(fn, data, threads, flags);
}
"""
COUNT = """
import ctypes, sys, torch
from omega_qvla.evaluation.bench_arms import vision_of
from omega_qvla.policies.hasten import hasten
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
import numpy as np
torch.set_num_threads(2)
regions = ctypes.c_long.in_dll(ctypes.CDLL(None), "regions")
policy = load_policy(sys.argv[1])
edge = vision_of(policy).config.image_size
image, parts = np.zeros((edge, edge, 3), np.uint8), policy.processor
width = getattr(parts, "state_dim", None) or parts.config.state_dim
state = np.zeros(width, np.float32)
seen = Observation({c: image for c in policy.cameras}, state, "open the drawer")
def chunk():
    before = regions.value
    with torch.inference_mode():
        inputs = policy.prepare([seen])
        policy.sample(policy.encode(inputs), policy.draw_noise(1, 0))
    return regions.value - before
plain = (chunk(), chunk())[1]
hasten(policy)
print(plain, (chunk(), chunk())[1])
"""


@native
@pytest.mark.slow
@pytest.mark.parametrize("name", ["groot-n15-metaworld", "pi05-metaworld"])
def test_a_chunk_of_the_demos_wakes_none_of_torchs_threads(name: str, tmp_path: Path) -> None:
    """They stay awake for milliseconds afterwards, on the cores that the kernels' own need."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and glibc")
    (tmp_path / "shim.c").write_text(SHIM)
    library = tmp_path / "shim.so"
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "shim.c"), "-ldl"]
    subprocess.run(build, check=True)
    checkpoint = Path(__file__).resolve().parents[2] / "assets" / name
    command = [sys.executable, "-c", COUNT, str(checkpoint)]
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    plain, hastened = map(int, run.stdout.split())
    if plain == 0:
        pytest.skip("this torch does not share work through GNU OpenMP")
    assert hastened == 0
