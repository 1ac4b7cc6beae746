"""What is repeated from a list has the bits of what it repeats; what cannot be repeated is not."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from numerics.problems import random
from omega_qvla.kernels import rows
from omega_qvla.kernels.dense import PackedDense
from omega_qvla.modules import captured as capturing
from omega_qvla.modules.capture import LIMIT
from omega_qvla.modules.captured import Captured

pytestmark = pytest.mark.skipif(rows.compiled() is None, reason="needs the kernels")


class Part(nn.Module):
    """A function of kernels and torch, and how often Python ran it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.weight = random(24, 16)
        self.dense = PackedDense.of(self.weight, None)
        self.runs = 0

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [3, 16], y [16, 3]."""
        self.runs += 1
        assert self.dense is not None
        wide = self.dense(self.inner(x))  # a kernel
        assert wide is not None
        gate, up = wide.chunk(2, -1)  # views
        active = rows.gated("silu", gate, up)
        mixed = torch.cat([active, y.T[:, :4]], -1) + self.weight.sum(1)[:16]
        normed = rows.layer_norm(mixed, 1e-5)
        assert normed is not None
        return normed, (normed * 2).T


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    return random(3, 16, seed=seed), random(3, 16, seed=seed + 100).T  # of other strides


@torch.inference_mode()
def outcomes(captured: Captured, part: Part, seeds: range, **options: Any) -> list[bool]:
    """Whether each result has the bits of the plain function, and its strides."""
    same = []
    for seed in seeds:
        got = captured(part, part.forward, *inputs(seed), **options)
        expected = part(*inputs(seed))
        part.runs -= 1
        same.append(
            all(
                torch.equal(a, b) and a.stride() == b.stride()
                for a, b in zip(got, expected, strict=True)
            )
        )
    return same


def test_from_the_second_time_on_the_list_runs_and_the_bits_are_the_same() -> None:
    captured, part = Captured(), Part()
    assert all(outcomes(captured, part, range(6)))
    assert captured.repeats == 5 and not captured.refused
    assert part.runs == 2  # by itself, and to be captured


def test_results_are_not_written_over_by_the_next_call() -> None:
    captured, part = Captured(), Part()
    with torch.inference_mode():
        first, second = (captured(part, part.forward, *inputs(s)) for s in (1, 1))
        third = captured(part, part.forward, *inputs(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(second[0], third[0])


def test_other_shapes_keys_and_numbers_of_threads_are_captured_apart() -> None:
    captured, part = Captured(), Part()
    outcomes(captured, part, range(3))
    assert all(outcomes(captured, part, range(3), key="other"))
    assert (captured.repeats, part.runs) == (4, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert all(outcomes(captured, part, range(3)))
    finally:
        torch.set_num_threads(threads)
    assert (captured.repeats, part.runs) == (6, 6)

    def double(x: Tensor) -> Tensor:
        return x + x

    with torch.inference_mode():
        for size in (4, 5, 4, 5, 4, 5):
            x = random(size)
            assert torch.equal(captured(part, double, x, key="double"), x + x)
    assert captured.repeats == 10


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "in place": (lambda x: x.clone().add_(1), "changes a tensor in place"),
    "a value": (lambda x: x * float(x.sum()), "reads values"),
    "a mask": (lambda x: x[x > 0], "reads values"),
    "noise": (lambda x: x + torch.rand(1), "draws random numbers"),
    "room": (lambda x: x + torch.zeros(LIMIT, dtype=torch.uint8)[:1], "bytes"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_repeated_runs_by_itself(case: str) -> None:
    function, reason = REFUSED[case]
    captured, part = Captured(), nn.Identity()
    with torch.inference_mode():
        for seed in range(4):
            x = random(8, seed=seed)
            torch.manual_seed(seed)
            got = captured(part, function, x)
            torch.manual_seed(seed)
            assert torch.equal(got, function(x))
    assert captured.repeats == 0
    assert len(captured.refused) == 1 and reason in captured.refused[0]


def test_a_value_of_what_never_changes_may_be_read() -> None:
    captured, which = Captured(), torch.tensor([2])

    def chosen(x: Tensor) -> Tensor:
        return x[int(which)] + which[which == 2]

    with torch.inference_mode():
        for seed in range(4):
            x = random(8, seed=seed)
            assert torch.equal(captured(nn.Identity(), chosen, x), x[2:3] + 2)
    assert captured.repeats == 3


def test_who_watches_sees_every_call() -> None:
    captured, part, seen = Captured(), Part(), []
    outcomes(captured, part, range(3))
    handle = part.inner.register_forward_hook(lambda *_: seen.append(1))
    assert all(outcomes(captured, part, range(2)))
    assert len(seen) == 2 * 2 and captured.repeats == 2  # the expected ones are watched too
    handle.remove()
    assert all(outcomes(captured, part, range(2)))
    assert captured.repeats == 4
    with torch.inference_mode(), FlopCounterMode(display=False):
        captured(part, part.forward, *inputs(0))
    assert captured.repeats == 4


def test_nothing_is_captured_where_gradients_may_be_asked_for() -> None:
    captured, weight = Captured(), random(4).requires_grad_()
    for _ in range(3):
        got = captured(nn.Identity(), lambda x: x * weight, random(4))
        assert got.requires_grad
    assert captured.repeats == 0


def test_a_capture_waits_until_nobody_watches() -> None:
    captured, part = Captured(), Part()
    handle = part.inner.register_forward_hook(lambda *_: None)
    outcomes(captured, part, range(3))
    assert captured.repeats == 0 and not captured.refused
    handle.remove()
    assert all(outcomes(captured, part, range(3))) and captured.repeats == 3


def test_what_the_kernels_read_stays_where_it_was() -> None:
    """A rotary table that the model had replaced since was read from memory of others."""
    captured, part, size = Captured(), nn.Identity(), 4096
    gains = [random(size)]
    plain = gains[0].clone()

    def scaled(x: Tensor) -> Tensor:
        done = rows.rms_norm(x, 1e-6, gains[0])
        assert done is not None
        return done

    with torch.inference_mode():
        for seed in range(2):
            captured(part, scaled, random(2, size, seed=seed))
        gains.clear()
        gc.collect()
        litter = [torch.full((size,), float("nan")) for _ in range(64)]
        x = random(2, size, seed=9)
        got = captured(part, scaled, x)
        assert captured.repeats == 2 and len(litter) == 64
        assert torch.equal(got, rows.rms_norm(x, 1e-6, plain))  # type: ignore[arg-type]


def test_the_oldest_captures_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, part = Captured(), nn.Identity()
    monkeypatch.setattr(capturing, "KEPT_BYTES", 10_000)
    with torch.inference_mode():
        for key in range(6):  # 4000 bytes each: input and result
            for _ in range(2):
                captured(part, lambda x: x + 1, random(500), key=key)
        kept = [known for known in captured._known.values() if known is not None]
        assert len(kept) == 2
        captured(part, lambda x: x + 1, random(500), key=0)
    assert captured.repeats == 6


def test_threads_do_not_disturb_each_other() -> None:
    captured, part = Captured(), Part()
    failures: list[int] = []

    def work(offset: int) -> None:
        for i in range(200):
            if not all(outcomes(captured, part, range(offset + i, offset + i + 1))):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and captured.repeats > 0


def test_a_failed_call_leaves_no_tape_behind() -> None:
    captured, part = Captured(), Part()

    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    with torch.inference_mode():
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                captured(part, fails, random(4), key="fails")
    assert all(outcomes(captured, part, range(3))) and captured.repeats == 2


def test_copies_begin_without_captures() -> None:
    captured, part = Captured(), Part()
    outcomes(captured, part, range(3))
    for made in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert made.repeats == 0 and not made._known
