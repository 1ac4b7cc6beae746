"""Which denoising step is running: carried by context, never by a global variable.

The action head's sampling loop opens `denoising_step(s, n)` around each step. Layers with
step-dependent activation scales, and observers, read it with `current_step()`. A
`ContextVar` keeps concurrent inferences (threads, tasks) apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Step:
    """Index of the running denoising step and how many the trajectory has."""

    index: int
    total: int


_CURRENT: ContextVar[Step | None] = ContextVar("omega_qvla_denoising_step", default=None)


@contextmanager
def denoising_step(index: int, total: int) -> Iterator[Step]:
    """Declare that the code inside runs denoising step `index` of `total`.

    Raises:
        ValueError: unless 0 <= index < total.
    """
    if not 0 <= index < total:
        raise ValueError(f"denoising step {index} is not in 0..{total - 1}")
    step = Step(index, total)
    token = _CURRENT.set(step)
    try:
        yield step
    finally:
        _CURRENT.reset(token)


def current_step() -> Step | None:
    """The running denoising step, or None outside the action head's loop (backbone)."""
    return _CURRENT.get()
