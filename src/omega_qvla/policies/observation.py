"""What a robot (or a simulator) hands to a policy at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """One instant, in the robot's raw units.

    Attributes:
        images: camera name -> uint8 [height, width, 3], RGB, right side up.
        state: float32 [state_dim], proprioception in raw units (metres, radians, ...).
        prompt: the instruction in words.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    prompt: str
