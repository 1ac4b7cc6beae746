"""Where a parallel gripper can take hold of a LIBERO object from above."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Metres. The fingers open to 8 cm; the pads reach from 5 mm below the grip point to 12 mm above
#: it, the palm begins 24 mm above it.
_OPENING = 0.072
_BELOW_TOP = 0.020
_ABOVE_BOTTOM = 0.010
_BELOW_RIM = 0.012
_PAD = 0.012
#: What the open hand occupies around the grip point: half-widths along the closing direction
#: and across it, from this far above the grip point upwards.
_HAND, _HAND_ABOVE = (0.115, 0.040), 0.020
_FINGERS = (0.065, 0.015)
_YAWS = np.deg2rad(np.arange(-90, 90, 15))
_RIM_DIRECTIONS = np.deg2rad(np.arange(0, 360, 15))


@dataclass(frozen=True)
class Grasp:
    """A place to close the fingers.

    point: float [3], grip point in the world, metres.
    yaw:   direction in which the fingers close, radians from the world's x axis.
    score: lower is better: width in metres, plus what the hand would touch.
    """

    point: np.ndarray
    yaw: float
    score: float


@dataclass(frozen=True)
class Shape:
    """Collision boxes of one object in the world: corners float [boxes, 8, 3], metres."""

    corners: np.ndarray

    @property
    def bottom(self) -> float:
        """Lowest point."""
        return float(self.corners[..., 2].min())

    @property
    def top(self) -> float:
        """Highest point."""
        return float(self.corners[..., 2].max())

    def at_height(self, z: float) -> np.ndarray:
        """Corners float [n, 2] of the boxes that the pads meet when the grip point is at `z`."""
        low, high = self.corners[..., 2].min(axis=1), self.corners[..., 2].max(axis=1)
        met = (low <= z + _PAD) & (high >= z - _PAD)
        found: np.ndarray = self.corners[met][..., :2].reshape(-1, 2)
        return found


def object_shape(sim: Any, body: int) -> Shape:
    """The collision geometry of a body and of everything that hangs on it."""
    model, data = sim.model._model, sim.data._data
    bodies = {body}
    for child in range(body + 1, model.nbody):  # parents come before their children
        if int(model.body_parentid[child]) in bodies:
            bodies.add(child)
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    boxes = []
    for geom in range(model.ngeom):
        if int(model.geom_bodyid[geom]) in bodies and model.geom_contype[geom]:
            center, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
            matrix = data.geom_xmat[geom].reshape(3, 3)
            boxes.append(data.geom_xpos[geom] + (center + signs * half) @ matrix.T)
    return Shape(np.array(boxes))


def plan_grasps(target: Shape, others: list[Shape]) -> list[Grasp]:
    """Grasps of `target` from above, best first: around it where it fits, else by its rim."""
    found = list(_around(target, others)) or list(_rim(target, others))
    return sorted(found, key=lambda grasp: grasp.score)


def _around(target: Shape, others: list[Shape]) -> Iterator[Grasp]:
    z = max(target.top - _BELOW_TOP, target.bottom + _ABOVE_BOTTOM)
    corners = target.at_height(z)
    for yaw in _YAWS:
        axes = _axes(yaw)
        along = corners @ axes.T
        low, high = along.min(axis=0), along.max(axis=0)
        width = float(high[0] - low[0])
        if width <= _OPENING:
            point = np.append((low + high) / 2 @ axes, z)
            # Of two that are as wide the one that turns the wrist less.
            turn = 0.01 * abs(np.sin(yaw - np.pi / 2))
            yield Grasp(point, float(yaw), width + turn + _touched(point, yaw, others))


def _rim(target: Shape, others: list[Shape]) -> Iterator[Grasp]:
    z = target.top - _BELOW_RIM
    corners = target.at_height(z)
    center = (corners.min(axis=0) + corners.max(axis=0)) / 2
    for yaw in _RIM_DIRECTIONS:
        outward = _axes(yaw)[0]
        radius = float(((corners - center) @ outward).max())
        point = np.append(center + (radius - 0.004) * outward, z)
        folded = (yaw + np.pi / 2) % np.pi - np.pi / 2
        turn = 0.02 * abs(np.sin(yaw - np.pi / 2))
        yield Grasp(point, float(folded), turn + _touched(point, yaw, others))


def _touched(point: np.ndarray, yaw: float, others: list[Shape]) -> float:
    """How deep other objects stand in the way of the open hand; 0 where they do not."""
    axes, total = _axes(yaw), 0.0
    for other in others:
        for half, above in ((_HAND, _HAND_ABOVE), (_FINGERS, 0.0)):
            inside = other.corners[..., 2].max(axis=1) > point[2] + above
            if not inside.any():
                continue
            offsets = (other.corners[inside][..., :2] - point[:2]) @ axes.T
            low, high = offsets.min(axis=1), offsets.max(axis=1)
            depth = np.minimum(half - low, high + half).min(axis=1)
            total += float(np.maximum(depth, 0.0).max()) * 10
    return total


def _axes(yaw: float) -> np.ndarray:
    """float [2, 2]: the closing direction, and the horizontal direction across it."""
    return np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
