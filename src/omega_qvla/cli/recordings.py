"""Recorded observations as the command line names them: files, folders, datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla.calibration.samples import ObservationSet, read_observations
from omega_qvla.calibration.sources import (
    LeRobotDataset,
    ObservationMap,
    RecordedFolder,
    Source,
    StateColumns,
    draw,
)
from omega_qvla.calibration.sources.base import DEFAULT_HELD_OUT, Part
from omega_qvla.calibration.sources.layout import read_layout
from omega_qvla.calibration.sources.mapping import DEFAULT_STATE_KEY, map_cameras
from omega_qvla.cli.parsing import unique
from omega_qvla.errors import ConfigError, EvaluationError, ObservationError
from omega_qvla.pack.reader import read_manifest

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy


def open_recordings(args: argparse.Namespace, policy: Policy) -> Source | None:
    """What `parsing.add_recordings`' options name; None where they name nothing.

    Raises:
        ConfigError: options that do not go together.
        CalibrationError: unreadable, or without a camera of the policy.
    """
    if args.observations and args.dataset:
        raise ConfigError("give one of --observations and --dataset, not both")
    given = unique(args.camera, "camera")
    keys = args.state_key or [DEFAULT_STATE_KEY]
    state = tuple(StateColumns.parse(key) for key in keys)
    if args.dataset:
        layout = read_layout(args.dataset.resolve())
        cameras = map_cameras(policy.cameras, given, layout.cameras, str(args.dataset))
        return LeRobotDataset(layout, ObservationMap(cameras, state))
    if args.observations and args.observations.is_dir():
        return RecordedFolder.open(args.observations, policy.cameras, ObservationMap(given, state))
    if args.camera or args.state_key:
        raise ConfigError("--camera and --state-key go with --dataset or a folder of recordings")
    return read_observations(args.observations) if args.observations else None


def held_out_of(args: argparse.Namespace) -> float:
    """The held-out fraction; by default, a single file of observations is one part itself."""
    if args.held_out is not None:
        return float(args.held_out)
    folder = args.dataset or (args.observations and args.observations.is_dir())
    return DEFAULT_HELD_OUT if folder else 0.0


def draw_checked(
    args: argparse.Namespace, source: Source, which: Part, n: int | None, policy: Policy
) -> ObservationSet:
    """`n` observations of one part (of all, where nothing is held out) that the policy accepts.

    Raises:
        CalibrationError: too few of them, or something that cannot be read.
        ObservationError: the policy wants other images or another state.
    """
    held_out = held_out_of(args)
    which = which if held_out else "all"
    samples = draw(source, n, getattr(args, "seed", 0), which=which, held_out=held_out)
    try:
        policy.prepare(samples.observations[:1])
    except ObservationError as error:
        raise ObservationError(
            f"{error}; the observations are {source.source or 'of another policy'}. Of a dataset "
            "or a folder, --state-key KEY=0:7,22 chooses the columns of the state, --camera "
            "NAME=KEY the images; images of another size need the setting `resize: true`"
        ) from error
    return samples


def check_unseen(label: str, pack: str | Path, samples: ObservationSet) -> None:
    """Raise EvaluationError if the pack was calibrated on an episode of the held-out samples."""
    calibration = read_manifest(pack).calibration
    held = {(meta.task, meta.episode) for meta in samples.meta}
    seen = {
        (task, episode)
        for part in calibration.get("parts", [calibration])  # a merged pack may have several
        if _recording(str(part.get("source", ""))) == _recording(samples.source)
        for task, episode, _ in part.get("samples", [])
    }
    if held & seen:
        episodes = ", ".join(str(episode) for _, episode in sorted(held & seen))
        raise EvaluationError(
            f"pack {label!r} was calibrated on held-out episode(s) {episodes}; calibrate and "
            "compare with the same --held-out"
        )


def _recording(source: str) -> str:
    """A source's words without the mapping: which recording it is."""
    return source.partition(";")[0]
