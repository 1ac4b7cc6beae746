"""The paired rollout as pictures: an animation of both arms side by side, and a strip."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from omega_qvla.evaluation.records import Trace
from omega_qvla.evaluation.report.data import PairedEpisode

_MAX_FRAMES = 48
_STRIP = 6
_FRAME_MS, _LAST_MS = 110, 1800
_GAP = 6
_SUCCESS, _FAILURE = (32, 150, 84), (200, 60, 48)


def has_frames(episode: PairedEpisode) -> bool:
    """Whether every arm of the episode was recorded with frames."""
    return bool(episode.traces) and all(len(t.frames) for t in episode.traces.values())


def animation(episode: PairedEpisode) -> str:
    """Both arms side by side in step with each other: a data URI of an animated WebP.

    An arm that has finished stays on its last frame, framed green (success) or red.
    """
    from PIL import Image

    traces = list(episode.traces.values())
    steps = sorted({int(step) for trace in traces for step in trace.frame_steps})
    grid = _thin(steps, _MAX_FRAMES)
    pictures = [Image.fromarray(_side_by_side([_at(t, s) for t in traces])) for s in grid]
    durations = [_FRAME_MS] * (len(pictures) - 1) + [_LAST_MS]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        quality=72,
        method=4,
    )
    return _uri(buffer)


def strip(episode: PairedEpisode) -> str:
    """A row of moments per arm, for readers who want no motion: a data URI of a WebP."""
    from PIL import Image

    rows = [
        _side_by_side([_at(trace, step) for step in _thin(trace.frame_steps.tolist(), _STRIP)])
        for trace in episode.traces.values()
    ]
    width = max(row.shape[1] for row in rows)
    padded = [_pad(row, width) for row in rows]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(padded)).save(buffer, "WEBP", quality=76, method=4)
    return _uri(buffer)


def _thin(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of `steps`, evenly, first and last included."""
    picks = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return [steps[index] for index in picks]


def _at(trace: Trace, step: int) -> np.ndarray:
    """The newest frame at `step`; framed in the colour of the outcome once it is over."""
    index = int(np.searchsorted(trace.frame_steps, step, side="right")) - 1
    frame: np.ndarray = trace.frames[max(0, index)].copy()
    if step >= len(trace.actions):
        edge = max(2, frame.shape[0] // 40)
        colour = np.array(_SUCCESS if trace.success else _FAILURE, np.uint8)
        frame[:edge], frame[-edge:] = colour, colour
        frame[:, :edge], frame[:, -edge:] = colour, colour
    return frame


def _side_by_side(frames: Sequence[np.ndarray]) -> np.ndarray:
    """RGBA, with transparent gaps: the page's own background shows, light or dark."""
    gap = np.zeros((frames[0].shape[0], _GAP, 4), np.uint8)
    parts: list[np.ndarray] = []
    for frame in frames:
        opaque = np.full((*frame.shape[:2], 1), 255, np.uint8)
        parts += [gap, np.concatenate([frame, opaque], axis=2)]
    return np.concatenate(parts[1:], axis=1)


def _pad(row: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros((row.shape[0] + _GAP, width, 4), np.uint8)
    padded[: row.shape[0], : row.shape[1]] = row
    return padded


def _uri(buffer: io.BytesIO) -> str:
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
