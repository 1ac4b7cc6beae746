"""Drift of a cell's arms: one line per arm in a file of records, appended as it is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.cli.comparison.observations import load_observations
from omega_qvla.cli.measure import drift_seeds
from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.open_loop import Drift, chunk_cosines, chunk_drift, predict_chunks
from omega_qvla.evaluation.records import ArmKey
from omega_qvla.files import append_line, atomic_file
from omega_qvla.pack.apply import apply_pack
from omega_qvla.pack.files import why_not_written
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import load_policy

if TYPE_CHECKING:
    from omega_qvla.cli.comparison.cells import Cell
    from omega_qvla.cli.comparison.plan import Comparison
    from omega_qvla.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class DriftRecord:
    """What was measured of one arm of one cell.

    pack: sha256 of the pack file.  backend: what ran its quantized layers.
    build_s: seconds that the build took, without the calibration; None if it was there.
    cosine_p01: the cosine that one pair in a hundred falls below.
    by_draw: (median, minimum) for each of the noises that the observations were run with.
    """

    checkpoint: str
    variant: str
    arm: str
    pack: str
    backend: str
    build_s: float | None
    layer_bytes: int
    layer_bytes_16bit: int
    drift: Drift
    cosine_p01: float
    by_draw: tuple[tuple[float, float], ...]

    @property
    def key(self) -> ArmKey:
        """Its place in a comparison."""
        return ArmKey(self.checkpoint, self.variant, self.arm)

    def to_json(self) -> str:
        """One line, which has no infinity: null stands for it."""
        plain = dataclasses.asdict(self)
        drift = plain["drift"]
        drift["channel_nmse"] = [_finite(value) for value in drift["channel_nmse"]]
        drift["relative_error"] = _finite(drift["relative_error"])
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> DriftRecord:
        """The inverse. Raises EvaluationError."""
        try:
            plain = json.loads(line)
            drift = plain["drift"]
            drift["channel_nmse"] = tuple(_infinite(value) for value in drift["channel_nmse"])
            drift["relative_error"] = _infinite(drift["relative_error"])
            pairs = tuple((median, low) for median, low in plain["by_draw"])
            return cls(**{**plain, "drift": Drift(**drift), "by_draw": pairs})
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"not a record of drift: {error!r}") from error


def drift_file(plan: Comparison) -> Path:
    """One JSON line per arm of every cell."""
    return plan.out / "drift.jsonl"


def read_drift(path: Path) -> dict[ArmKey, DriftRecord]:
    """The records of a file; a torn last line is left out.

    Raises:
        EvaluationError: a line is no record, or an arm is there twice.
    """
    found: dict[ArmKey, DriftRecord] = {}
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            record = DriftRecord.from_json(line)
        except EvaluationError as error:
            raise EvaluationError(f"{path}, line {number}: {error}") from error
        if record.key in found:
            raise EvaluationError(f"{path}, line {number}: {record.key} is there twice")
        found[record.key] = record
    return found


def mend_drift_file(path: Path, without: Iterable[str] = ()) -> None:
    """Drop a torn last line, and the records of the arms `without`."""
    if not path.exists():
        return
    dropped = set(without)
    kept = [record for record in read_drift(path).values() if record.arm not in dropped]
    text = "".join(f"{record.to_json()}\n" for record in kept).encode()
    if text != path.read_bytes():
        with atomic_file(path, parents=True) as stream:
            stream.write(text)


class DriftMeter:
    """Measures arms of one cell against its full-precision policy, whose chunks it keeps."""

    def __init__(self, cell: Cell, policy: Policy) -> None:
        self._cell = cell
        samples = load_observations(cell.plan, "held-out")
        draws = range(cell.plan.draws)
        self._observations = list(samples.observations) * len(draws)
        self._seeds = [seed for draw in draws for seed in drift_seeds(samples, draw)]
        self._expected = predict_chunks(policy, self._observations, self._seeds)

    def measure(self, arm: str, build_s: float | None) -> DriftRecord:
        """Run the arm's pack on the held-out observations and append the record."""
        cell = self._cell
        pack = cell.pack(arm)
        quantized: Policy = load_policy(cell.checkpoint, device=cell.plan.device)
        report = apply_pack(quantized, read_pack(pack), cell.plan.backend)
        chunks = predict_chunks(quantized, self._observations, self._seeds)
        cosines = chunk_cosines(self._expected, chunks)
        record = DriftRecord(
            checkpoint=cell.name,
            variant=cell.variant,
            arm=arm,
            pack=file_sha256(pack),
            backend=report.backend,
            build_s=None if build_s is None else round(build_s, 2),
            layer_bytes=report.layer_bytes,
            layer_bytes_16bit=report.layer_bytes_16bit,
            drift=chunk_drift(self._expected, chunks),
            cosine_p01=float(np.quantile(cosines, 0.01)),
            by_draw=_by_draw(cosines, cell.plan.draws),
        )
        append_record(drift_file(cell.plan), record.to_json())
        return record


def check_pack(cell: Cell, record: DriftRecord) -> None:
    """Raise EvaluationError if the pack is not the one that was measured."""
    pack = cell.pack(record.arm)
    if file_sha256(pack) != record.pack:
        raise EvaluationError(
            f"{cell}: the pack of {record.arm} is not the one that its drift was measured with "
            f"(another program or machine made it); measure it again with --redo {record.arm}"
        )


def drifts(records: Mapping[ArmKey, DriftRecord]) -> dict[ArmKey, Drift]:
    """Arm -> drift, as summaries take it."""
    return {key: record.drift for key, record in records.items()}


def sizes(records: Mapping[ArmKey, DriftRecord]) -> dict[ArmKey, tuple[int, int]]:
    """Arm -> (bytes of the quantized layers, the same in 16 bit)."""
    return {key: (r.layer_bytes, r.layer_bytes_16bit) for key, r in records.items()}


def file_sha256(path: Path) -> str:
    """Of the contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_record(path: Path, line: str) -> None:
    """Write one line and sync it; several processes share the file.

    Raises:
        EvaluationError: the disk did not take all of it; then nothing of it is left there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        append_line(path, f"{line}\n".encode(), create=True)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot take another record: {why_not_written(error)}"
        ) from error


def _by_draw(cosines: np.ndarray, draws: int) -> tuple[tuple[float, float], ...]:
    rows: Sequence[np.ndarray] = np.split(cosines, draws)
    return tuple((float(np.median(row)), float(row.min())) for row in rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _infinite(value: Any) -> float:
    return math.inf if value is None else float(value)
