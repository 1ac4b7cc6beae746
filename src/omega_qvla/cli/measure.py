"""Measurements that more than one verb takes."""

from __future__ import annotations

import argparse

from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.cli.parsing import unique
from omega_qvla.errors import ConfigError
from omega_qvla.evaluation.records import REFERENCE
from omega_qvla.evaluation.rollout import noise_seed

#: Steps of an episode are below this: another draw's seeds are nobody else's.
_DRAW = 1 << 20


def drift_seeds(samples: ObservationSet, draw: int = 0) -> list[int]:
    """The noise seed of every observation: by its episode and step, so equal for all arms.

    draw: another noise for each of them.
    """
    return [noise_seed(meta.episode, meta.step + draw * _DRAW) for meta in samples.meta]


def named_packs(args: argparse.Namespace) -> dict[str, str]:
    """The --pack arguments by label.

    Raises:
        ConfigError: a label is used twice, or is the reference's: the pack would be measured
            against itself.
    """
    packs = unique(args.pack, "pack")
    if REFERENCE in packs:
        raise ConfigError(f"{REFERENCE!r} is the checkpoint itself; give the pack another label")
    return packs
