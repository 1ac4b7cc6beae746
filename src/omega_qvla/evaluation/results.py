"""The results file: a header line, then one JSON line per episode; survives kills."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.plan import Plan
from omega_qvla.evaluation.records import Arm, EpisodeRecord
from omega_qvla.files import append_line, atomic_file
from omega_qvla.pack.files import why_not_written

_FORMAT = 1


def read_results(path: Path) -> tuple[dict[str, Any], list[EpisodeRecord]]:
    """Header and records of a results file, records sorted by arm, task and seed.

    A last line without its line end was cut off by a kill: it is left out.

    Raises:
        EvaluationError: the file is missing, has no header of this format, or has a
            line in its middle that is no record, or an episode twice.
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
    counts = Counter((record.key, record.episode) for record in records)
    for (key, episode), count in counts.items():
        if count > 1:  # it would count for several in every rate
            raise EvaluationError(
                f"{path} holds {key} on {episode.task}, seed {episode.seed}, {count} times: "
                "remove the lines too many"
            )
    return header, records


class ResultsFile:
    """Appends records to a results file after checking that they belong there.

    A context manager: while it is open, no other process can open the same file.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        """Open `path` for `plan`, creating it if it does not exist.

        Raises:
            EvaluationError: the file was recorded under other settings, or with other
                files behind one of the arms (the message says what differs); or another
                process has it open.
        """
        self.path = path
        header: dict[str, Any] = {
            "omega_qvla_results": _FORMAT,
            "settings": plan.settings(),
            "arms": plan.arm_fingerprints(),
            "environment": environment(plan.env),
            "plan": plan.to_dict(),
        }
        self.records: list[EpisodeRecord] = []
        self._lock = results_lock(path)
        try:
            # A kill between creation and the header's line end leaves less than one line.
            if path.exists() and b"\n" in path.read_bytes():
                old, self.records = _read(path)
                check_same(path, old, header)
                header = joined(old, header)
            # Rewritten whole: drops a torn last line, and takes up arms added since.
            write_results(path, header, self.records)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others open the file."""
        self._lock.close()

    def append(self, record: EpisodeRecord) -> None:
        """Write one line, in one system call, and wait until it is on the disk.

        Raises:
            EvaluationError: the file is gone, or the disk did not take the line; a part of it
                is taken back.
        """
        try:
            append_line(self.path, _line(record.to_dict()))
        except OSError as error:
            raise EvaluationError(
                f"{self.path}: cannot take another record: {why_not_written(error)}"
            ) from error
        self.records.append(record)


def write_results(path: Path, header: Mapping[str, Any], records: Sequence[EpisodeRecord]) -> None:
    """Write a whole results file, atomically."""
    with atomic_file(path, parents=True) as stream:
        stream.write(_line(header))
        for record in records:
            stream.write(_line(record.to_dict()))


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The header of both: all arms, at the paths that the newer one knows."""
    arms = {
        Arm(**arm).key: arm
        for header in (old, new)
        for arm in header.get("plan", {}).get("arms", [])
    }
    return {
        **new,
        "arms": {**old.get("arms", {}), **new.get("arms", {})},
        "plan": {**new.get("plan", {}), "arms": list(arms.values())},
    }


def results_lock(path: Path) -> IO[bytes]:
    """Hold `path` until the stream is closed; the operating system lets go when we die.

    Raises:
        EvaluationError: somebody else holds it.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the results, since these are replaced whole. Left there: to remove it would
    # let a third process lock another file of the same name.
    stream = path.with_name(f".{path.name}.lock").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise EvaluationError(
            f"{path} is being written by another evaluation: wait for it, or use another file"
        ) from error
    return stream


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


def check_same(
    path: Path, old: Mapping[str, Any], new: Mapping[str, Any], other: Path | None = None
) -> None:
    """Settings must agree, and so must every arm that both headers know.

    Args:
        old: the header of `path`. new: that of the file `other`, or what is wanted now.

    Raises:
        EvaluationError: they do not.
    """
    known, wanted = old.get("arms", {}), new.get("arms", {})
    common = [name for name in wanted if name in known]
    found = differences(
        {"settings": old.get("settings", {}), "arms": {name: known[name] for name in common}},
        {"settings": new.get("settings", {}), "arms": {name: wanted[name] for name in common}},
    )
    if found and other is not None:
        raise EvaluationError(
            f"{path} and {other} were recorded under other settings, and cannot be one result. "
            f"{'; '.join(found)} (there: {path}, now: {other})"
        )
    if found:
        raise EvaluationError(
            f"{path} was recorded under other settings; use another file or delete it. "
            + "; ".join(found)
        )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dictionaries of JSON values, one line each."""
    found, expected = _flat(there), _flat(now)
    return [
        f"{key}: {found.get(key, 'absent')!r} there, {expected.get(key, 'absent')!r} now"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]


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
