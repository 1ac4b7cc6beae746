"""Which camera and which columns of a dataset are the policy's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.errors import CalibrationError, ConfigError

DEFAULT_STATE_KEY = "observation.state"
#: A dataset's key is taken for the camera NAME, unasked, only where it is one of these.
_CAMERA_KEYS = ("{}", "observation.images.{}", "images.{}")


@dataclass(frozen=True)
class StateColumns:
    """A dataset's key that is part of the state, and its columns (None: all of them)."""

    key: str
    columns: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> StateColumns:
        """KEY, or KEY=COLUMNS with columns as in `0:7,22` (the end left out, as in Python).

        Raises:
            ConfigError: columns that are no such list.
        """
        key, equals, columns = text.partition("=")
        if not equals:
            return cls(key)
        found: list[int] = []
        try:
            for piece in columns.split(","):
                low, colon, high = piece.partition(":")
                found.extend(range(int(low), int(high)) if colon else [int(low)])
        except ValueError:
            found = []
        if not (key and found) or min(found) < 0:
            raise ConfigError(
                f"{text!r}: columns of the state are written KEY=0:7,22 (first, one past the last)"
            )
        return cls(key, tuple(found))

    def __str__(self) -> str:
        if self.columns is None:
            return self.key
        return f"{self.key}={','.join(map(str, self.columns))}"

    def of(self, values: np.ndarray, where: str) -> np.ndarray:
        """The columns of `values` [n, d]. Raises CalibrationError where d is too small."""
        if self.columns is None:
            return values
        if max(self.columns) >= values.shape[1]:
            raise CalibrationError(
                f"{where}: {self.key} has {values.shape[1]} columns, column {max(self.columns)} "
                "was asked for"
            )
        return values[:, list(self.columns)]


@dataclass(frozen=True)
class ObservationMap:
    """The policy's camera -> the dataset's key, and the parts of the state in their order."""

    cameras: Mapping[str, str]
    state: tuple[StateColumns, ...] = (StateColumns(DEFAULT_STATE_KEY),)

    def __str__(self) -> str:
        cameras = [f"{name}={key}" for name, key in sorted(self.cameras.items())]
        return f"cameras {', '.join(cameras)}; state {', '.join(map(str, self.state))}"


def map_cameras(
    wanted: Iterable[str], given: Mapping[str, str], keys: Collection[str], where: str
) -> dict[str, str]:
    """The policy's camera -> one of the dataset's camera keys.

    A camera that is not `given` is found only under its own name (`wrist`,
    `observation.images.wrist` or `images.wrist`); nothing is guessed.

    Raises:
        CalibrationError: the dataset lacks a camera; the message lists those it has.
        ConfigError: `given` names a camera that the policy does not have.
    """
    wanted = list(wanted)
    unknown = sorted(set(given) - set(wanted))
    if unknown:
        raise ConfigError(
            f"the policy has no camera {', '.join(unknown)}; its cameras: {', '.join(wanted)}"
        )
    have = ", ".join(sorted(keys)) or "none"
    found = {}
    for camera in wanted:
        own = [name for form in _CAMERA_KEYS if (name := form.format(camera)) in keys]
        key = given.get(camera) or (own[0] if own else None)
        if key is None:
            raise CalibrationError(
                f"{where} has no camera {camera!r}; it has: {have}. Say which one it is: "
                f"--camera {camera}=KEY"
            )
        if key not in keys:
            raise CalibrationError(
                f"{where} has no camera {key!r} (for {camera!r}); it has: {have}"
            )
        found[camera] = key
    return found


def join_state(parts: Sequence[np.ndarray], steps: Sequence[int], where: str) -> np.ndarray:
    """Parts [n, d_i] side by side as float32 [n, d].

    Raises:
        CalibrationError: a value is not finite; the step (`steps`, n of them) and the columns
            are named.
    """
    state = np.concatenate([np.asarray(p, np.float64) for p in parts], axis=1).astype(np.float32)
    bad = np.argwhere(~np.isfinite(state))
    if len(bad):
        row = int(bad[0][0])
        columns = [int(column) for r, column in bad if r == row]
        raise CalibrationError(
            f"{where}: the state of step {steps[row]} is not finite in column(s) "
            f"{', '.join(map(str, columns[:8]))}"
        )
    return state
