"""Small files of a checkpoint: JSON in, JSON out, atomically, with named errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omega_qvla.errors import CheckpointError
from omega_qvla.files import replacing, write_text

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary file beside `path`, then put it in place: for libraries that
    take a name. The folder is made."""
    with replacing(path, parents=True) as temporary:
        write(temporary)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def options(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Make dataclass `cls` from JSON; lists become tuples, the key `family` is skipped.

    Raises:
        CheckpointError: an unknown or a missing key.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "family"}
    unknown = sorted(set(values) - {f.name for f in fields})
    if unknown:
        raise CheckpointError(f"{where}: unknown key {', '.join(unknown)}")
    unset = dataclasses.MISSING
    required = [f for f in fields if f.default is unset and f.default_factory is unset]
    missing = [f.name for f in required if f.name not in values]
    if missing:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)
