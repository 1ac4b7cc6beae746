"""What a build tells while it runs, and at its end."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omega_qvla.numerics.phases import Spent, Stopwatch
from omega_qvla.quantize.jobs import Job


@dataclass(frozen=True)
class Progress:
    """`done` of `total` observations times stages (calibrating) or layers (quantizing).

    layer: just done. share: estimated part of this call's work that is done, for an ETA.
    """

    stage: Literal["calibrating", "quantizing"]
    done: int
    total: int
    layer: str = ""
    share: float = 0.0


@dataclass(frozen=True)
class BuildReport:
    """Where the time of a build went, this call's share of it if it was resumed.

    phases: name -> seconds by the clock and of processors: `load` (reading and hashing
    weights), `collect` (running the policy), `hessian`, `scales` (choosing steps), `factorize`
    (transforming and factorizing Hessians), `round`, `write`, `other`.
    layers: in all; built: by this call. peak_memory: of the process so far, bytes resident.
    """

    phases: Mapping[str, Spent]
    layers: int
    built: int
    peak_memory: int

    @classmethod
    def of(cls, watch: Stopwatch, jobs: Sequence[Job], todo: Sequence[Job]) -> BuildReport:
        """The report of a build that `watch` has measured."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        return cls(dict(watch.phases), len(jobs), len(todo), peak * unit)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


class Teller:
    """Tells the progress of a build, with the share of the work that is done.

    The work of a layer is estimated as that of GPTQ: factorizing [in, in], correcting
    [out, in], and the products of calibration, as if there were as many tokens as inputs.
    """

    def __init__(
        self, jobs: Sequence[Job], todo: Sequence[Job], report: Callable[[Progress], None]
    ) -> None:
        self._report, self._total = report, len(jobs)
        self._finished = len(jobs) - len(todo)
        self._all, self._done = sum(map(_work, todo)), 0.0
        self.streaming = False

    def calibrating(self, done: int, total: int) -> None:
        """A batch of observations has gone through a stage."""
        self.streaming = True
        self._report(Progress("calibrating", done, total, share=self._share))

    def quantized(self, job: Job) -> None:
        """A layer is done."""
        self._finished += 1
        self._done += _work(job)
        self._report(
            Progress("quantizing", self._finished, self._total, job.name, share=self._share)
        )

    @property
    def _share(self) -> float:
        return self._done / self._all if self._all else 1.0


def _work(job: Job) -> float:
    rows, width = job.shape
    return float(width**3 + width**2 * rows)


def silent(progress: Progress) -> None:
    """Report to nobody."""
