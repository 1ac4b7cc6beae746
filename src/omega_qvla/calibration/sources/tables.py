"""Parquet files, read so that whatever is wrong with one is said with its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.calibration.sources.base import require
from omega_qvla.errors import CalibrationError


def columns_of(path: Path) -> list[str]:
    """The names of a file's columns. Raises CalibrationError: missing, truncated."""
    parquet, arrow = _arrow()
    try:
        names: list[str] = parquet.read_schema(path).names
    except (OSError, arrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    return names


def read_table(path: Path, columns: Sequence[str], episode: int | None = None) -> Any:
    """Columns of a file as a `pyarrow.Table`; with `episode`, the rows of that episode.

    Only row groups that can hold the episode are read.

    Raises:
        CalibrationError: missing, truncated, or without one of the columns.
    """
    parquet, arrow = _arrow()
    have = columns_of(path)
    missing = [name for name in columns if name not in have]
    if missing:
        raise CalibrationError(
            f"{path} has no column {', '.join(missing)}; it has: {', '.join(have)}"
        )
    chosen = None
    if episode is not None and "episode_index" in have:
        chosen = [("episode_index", "==", episode)]
    try:
        return parquet.read_table(path, columns=list(columns), filters=chosen, partitioning=None)
    except (OSError, arrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def matrix(table: Any, key: str, rows: Sequence[int], path: Path) -> np.ndarray:
    """Rows of a column of numbers or of equally long lists of numbers, float64 [n, d].

    Raises:
        CalibrationError: the values are something else, or missing.
    """
    values = table[key].take(list(rows)).to_pylist()
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: column {key} holds no vectors of one length") from error
    if array.ndim > 2:
        raise CalibrationError(f"{path}: column {key} holds arrays {list(array.shape[1:])}")
    return array.reshape(len(rows), -1)


def _arrow() -> tuple[Any, Any]:
    what = "reading a LeRobot dataset"
    return require("pyarrow.parquet", what), require("pyarrow", what)


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    if not path.exists():
        return CalibrationError(f"{path}: no such file; the dataset is incomplete")
    return CalibrationError(f"{path}: truncated or no parquet file: {error}")
