"""What every source of observations is: origins that are known at once, pixels on demand."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from omega_qvla.calibration.samples import ObservationSet, SampleMeta, part, pick
from omega_qvla.errors import CalibrationError

#: Which episodes to draw from: all of them, or one of two parts that share none.
Part = Literal["all", "calibration", "held-out"]
#: Fraction of each task's episodes that calibration leaves for measuring drift.
DEFAULT_HELD_OUT = 0.2
#: The parting does not depend on the sampling's seed: two builds with different seeds are
#: measured on the same episodes, none of which either has seen.
_PART_SEED = 0


class Source(Protocol):
    """Steps of episodes. `ObservationSet` is one that lies in memory already."""

    @property
    def meta(self) -> Sequence[SampleMeta]:
        """The origin of every step there is."""
        ...

    @property
    def source(self) -> str:
        """Where the observations were recorded and how they were read, in words."""
        ...

    def take(self, indices: Sequence[int]) -> ObservationSet:
        """Read the steps at `indices` of `meta`, in that order; no others are decoded."""
        ...


def draw(
    source: Source,
    n: int | None,
    seed: int = 0,
    *,
    which: Part = "all",
    held_out: float = DEFAULT_HELD_OUT,
) -> ObservationSet:
    """`n` observations of a source (None: all), balanced as `samples.pick` describes.

    Args:
        which: the part of the episodes; `calibration` and `held-out` share none, whatever
            the seeds, as long as `held_out` is the same.
        held_out: fraction of each task's episodes in the held-out part.

    Raises:
        CalibrationError: too few steps or episodes, or something that cannot be read.
    """
    among: Sequence[int] = range(len(source.meta))
    if which != "all":
        among = part(source.meta, held_out, _PART_SEED)[which == "held-out"]
    if n is not None and n > len(among):
        words = "" if which == "all" else f" in its {which} episodes"
        raise CalibrationError(
            f"{n} observations wanted, but there are only {len(among)}{words}: {source.source}"
        )
    return source.take(among if n is None else pick(source.meta, n, seed, among))


def require(module: str, what: str) -> Any:
    """An optional package. Raises CalibrationError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f"{what} needs {module.partition('.')[0]} ({error}); install it: "
            "pip install 'omega-qvla[lerobot]'"
        ) from error
