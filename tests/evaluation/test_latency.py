"""Arms take turns; stages add up; memory is what the system says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.bench_arms import BenchArm, compile_stacks, vision_of
from omega_qvla.evaluation.latency import Latency, alternate, measure
from omega_qvla.evaluation.peak_memory import available, reset_peak, resident
from policies.tiny import TINY, tiny_observation


def test_latency_of_known_seconds() -> None:
    latency = Latency.of([i / 1000 for i in range(1, 102)])
    assert latency.p50 == pytest.approx(51)
    assert latency.p95 == pytest.approx(96)
    assert latency.spread == pytest.approx(25 / 51)


def test_arms_take_turns_and_the_first_call_of_a_turn_is_not_timed() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        # Cold after the other arm, warm in the second call of its turn.
        time.sleep(0.05 if len(order) < 2 or order[-2] != name else 0.001)

    found = alternate({n: lambda n=n: call(n) for n in "ab"}, rounds=3, warm=1)  # type: ignore[misc]
    assert order == ["a", "a", "b", "b"] * 4
    assert all(latency.p95 < 40 for latency in found.values())


@pytest.mark.parametrize("family", list(TINY))
def test_stages_of_a_chunk(family: str) -> None:
    policy = TINY[family]()
    stages = measure({"fp32": policy}, tiny_observation(), rounds=3)["fp32"]
    whole = stages["chunk"].p95
    parts = stages["vision"].p50 + stages["prefix"].p50 + policy.num_steps * stages["step"].p50
    assert 0 < parts < 1.5 * whole
    assert not vision_of(policy)._forward_hooks  # nobody is left watching


def test_an_arm_of_a_pack_needs_one() -> None:
    with pytest.raises(EvaluationError, match="'native' runs a pack, and none was given"):
        BenchArm("native").load("nowhere", None)


@pytest.mark.slow
def test_compiled_stacks_act_the_same() -> None:
    policy, plain = TINY["pi05"](num_steps=2), TINY["pi05"](num_steps=2)
    compile_stacks(policy.module)
    expected = plain.infer(tiny_observation())
    np.testing.assert_allclose(policy.infer(tiny_observation()), expected, atol=1e-4)


@pytest.mark.skipif(not available(), reason="needs Linux's /proc")
def test_the_peak_sees_what_came_and_went() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak cannot be reset here")
    reset_peak()
    before = resident("VmHWM")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    peak = resident("VmHWM")
    del held
    assert peak - before > 48 << 20
