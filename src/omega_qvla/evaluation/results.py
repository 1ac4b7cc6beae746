"""The results file: a header line, then one JSON line per episode; survives kills."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.files import replace_file
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import EpisodeRecord

_FORMAT = 1


def read_results(path: Path) -> tuple[dict[str, Any], list[EpisodeRecord]]:
    """Header and records of a results file, records sorted by arm, task and seed.

    A last line without its line end was cut off by a kill: it is left out.

    Raises:
        EvaluationError: the file is missing, has no header of this format, or has a
            line in its middle that is no record.
    """
    header, records = _read(path)
    return header, sorted(records, key=lambda record: (record.key, record.episode))


def _read(path: Path) -> tuple[dict[str, Any], list[EpisodeRecord]]:
    """The same in the order of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read results {path}: {error}") from error
    lines = text.split("\n")[:-1]
    if not lines:
        raise EvaluationError(f"{path} has no header line: not a results file")
    header = _parse(lines[0], path, 1)
    if header.get("omega_qvla_results") != _FORMAT:
        raise EvaluationError(f"{path} does not start with a results header of format {_FORMAT}")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(EpisodeRecord.from_dict(_parse(line, path, number)))
        except EvaluationError as error:
            raise EvaluationError(f"{path}, line {number}: {error}") from error
    return header, records


class ResultsFile:
    """Appends records to a results file after checking that they belong there."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Open `path` for `plan`, creating it if it does not exist.

        Raises:
            EvaluationError: the file was recorded under other settings, or with other
                files behind one of the arms; the message says what differs.
        """
        self.path = path
        header: dict[str, Any] = {
            "omega_qvla_results": _FORMAT,
            "settings": plan.settings(),
            "arms": plan.arm_fingerprints(),
        }
        self.records: list[EpisodeRecord] = []
        # A kill between creation and the header's line end leaves less than one line.
        if path.exists() and b"\n" in path.read_bytes():
            old, self.records = _read(path)
            _check_same(path, old, header)
            header["arms"] = {**old["arms"], **header["arms"]}
        # Rewritten whole: drops a torn last line, and takes up arms added since.
        with replace_file(path) as stream:
            stream.write(_line(header))
            for record in self.records:
                stream.write(_line(record.to_dict()))

    def append(self, record: EpisodeRecord) -> None:
        """Write one line, in one system call, and wait until it is on the disk."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, _line(record.to_dict()))
            os.fsync(handle)
        finally:
            os.close(handle)
        self.records.append(record)


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, sort_keys=False, allow_nan=False) + "\n").encode()


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}, line {number} is not a JSON object")
    return value


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings must agree, and so must every arm that both know."""
    known = old.get("arms", {})
    common = {name: value for name, value in new["arms"].items() if name in known}
    expected = _flat({"settings": new["settings"], "arms": common})
    found = _flat(
        {"settings": old.get("settings", {}), "arms": {name: known[name] for name in common}}
    )
    differences = [
        f"{key}: {found.get(key, 'absent')!r} there, {expected.get(key, 'absent')!r} now"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if differences:
        raise EvaluationError(
            f"{path} was recorded under other settings; use another file or delete it. "
            + "; ".join(differences)
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(_flat(value, name))
        else:
            # Compared as the file stores it: a tuple comes back as a list.
            flat[name] = json.loads(json.dumps(value))
    return flat
