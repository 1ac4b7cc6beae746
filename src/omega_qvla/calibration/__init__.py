"""Calibration: observations in, statistics of every layer's input out."""

from omega_qvla.calibration.collect import Calibration, calibrate, collect, provenance
from omega_qvla.calibration.samples import (
    DEFAULT_SAMPLES,
    ObservationSet,
    SampleMeta,
    part,
    pick,
    read_observations,
    select_samples,
    split,
    write_observations,
)

__all__ = [
    "DEFAULT_SAMPLES",
    "Calibration",
    "ObservationSet",
    "SampleMeta",
    "calibrate",
    "collect",
    "part",
    "pick",
    "provenance",
    "read_observations",
    "select_samples",
    "split",
    "write_observations",
]
