"""One arm in a process of its own, for its peak memory.

    python -m omega_qvla.cli.memory_process ARM CHECKPOINT PACK OBSERVATIONS OPTIONS

prints one JSON object: the fields of `PeakMemory`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omega_qvla.errors import EvaluationError

if TYPE_CHECKING:
    from omega_qvla.evaluation.peak_memory import PeakMemory


def peak_memory(
    arm: str,
    checkpoint: str | os.PathLike[str],
    pack: str | os.PathLike[str] | None,
    observations: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
) -> PeakMemory:
    """Load and run an arm (see `BenchArm`) in a new process, on the first observation.

    options: keyword arguments of `BenchArm.load` (paths become strings).

    Raises:
        EvaluationError: the process failed, with what it said.
    """
    from omega_qvla.evaluation.peak_memory import PeakMemory

    words = [arm, os.fspath(checkpoint), "" if pack is None else os.fspath(pack)]
    command = [sys.executable, "-m", __name__, *words, os.fspath(observations)]
    command.append(json.dumps(dict(options or {}), default=os.fspath))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"measuring the memory of arm {arm!r} failed: {last}")
    return PeakMemory(**json.loads(run.stdout.splitlines()[-1]))


def main(words: list[str]) -> None:
    """The measured process."""
    from omega_qvla.calibration.samples import read_observations
    from omega_qvla.evaluation.bench_arms import BenchArm
    from omega_qvla.evaluation.peak_memory import measure_memory

    arm, checkpoint, pack, observations, options = words
    observation = read_observations(observations).observations[0]
    memory = measure_memory(
        BenchArm(arm), checkpoint, pack or None, observation, json.loads(options)
    )
    print(json.dumps(asdict(memory)))


if __name__ == "__main__":
    main(sys.argv[1:])
