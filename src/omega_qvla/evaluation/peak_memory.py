"""Peak memory of loading and running a policy. Figures are the kernel's (/proc/self): Linux only.

A peak says something of one arm only in a process that ran nothing before it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.bench_arms import BenchArm
from omega_qvla.policies.observation import Observation

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes resident in memory.

    base: of the interpreter with everything imported, before anything is loaded.
    load: highest while the checkpoint and the pack were loaded. run: highest during inference.
    """

    base: int
    load: int
    run: int


def available() -> bool:
    """Whether this system tells."""
    return _STATUS.exists()


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the highest since `reset_peak`.

    Raises:
        EvaluationError: the system does not tell.
    """
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise EvaluationError(f"peak memory is read from {_STATUS}, which is not here (Linux only)")


def reset_peak() -> None:
    """Let the highest start anew (where that is forbidden the old highest stays)."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def measure_memory(
    arm: BenchArm,
    checkpoint: str | os.PathLike[str],
    pack: str | os.PathLike[str] | None,
    observation: Observation,
    options: Mapping[str, Any] | None = None,
) -> PeakMemory:
    """Load `arm` and run it once, in this process, which should be new.

    options: keyword arguments of `BenchArm.load`.
    """
    base = resident()
    reset_peak()
    engine = arm.load(checkpoint, pack, **(options or {}))
    load = resident("VmHWM")
    reset_peak()
    engine.infer(observation)
    return PeakMemory(base, load, resident("VmHWM"))
