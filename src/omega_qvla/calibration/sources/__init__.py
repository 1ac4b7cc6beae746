"""Sources of observations: everything from which `samples` can be drawn, read where needed."""

from omega_qvla.calibration.sources.base import Source, draw
from omega_qvla.calibration.sources.lerobot import LeRobotDataset
from omega_qvla.calibration.sources.mapping import ObservationMap, StateColumns
from omega_qvla.calibration.sources.recorded import RecordedFolder

__all__ = [
    "LeRobotDataset",
    "ObservationMap",
    "RecordedFolder",
    "Source",
    "StateColumns",
    "draw",
]
