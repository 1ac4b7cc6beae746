"""Two arms' episodes side by side, as a film."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.records import Trace
from omega_qvla.files import atomic_file

#: Frames per second; at two control steps a frame, LIBERO's 20 Hz run in real time.
FPS = 10
_BAR, _GAP, _FONT = 24, 4, 13
_HOLD_S = 1.0
_INK, _PAPER = (235, 235, 235), (24, 24, 24)
_SOLVED, _FAILED = (70, 200, 120), (230, 90, 80)


def write_side_by_side(path: Path, title: str, traces: Mapping[str, Trace]) -> None:
    """Write an mp4 (H.264) of episodes that start together; a finished one stands still.

    Under each picture: the arm, the control step, and in the end how it went.

    Raises:
        EvaluationError: a package of the extra [video] is missing, or a trace has no frames.
    """
    av = _import("av")
    frames = list(side_by_side(title, traces))
    with atomic_file(path, parents=True) as stream, av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=FPS, options={"crf": "20"})
        track.height, track.width = frames[0].shape[:2]
        track.pix_fmt, track.time_base = "yuv420p", Fraction(1, FPS)
        for image in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(track.encode(None))


def side_by_side(title: str, traces: Mapping[str, Trace]) -> Iterator[np.ndarray]:
    """The film's pictures, uint8 [height, width, 3] with even edges, oldest first."""
    empty = [label for label, trace in traces.items() if not len(trace.frames)]
    if empty:
        raise EvaluationError(f"no frames of {', '.join(empty)}: record the episode with frames")
    steps = sorted({int(step) for trace in traces.values() for step in trace.frame_steps})
    for step in [*steps, *[steps[-1]] * round(_HOLD_S * FPS)]:
        yield _picture(title, [_shown(label, trace, step) for label, trace in traces.items()])


def _shown(label: str, trace: Trace, step: int) -> tuple[np.ndarray, str, tuple[int, int, int]]:
    """(frame, caption, colour of the caption) of one arm at a control step."""
    index = int(np.searchsorted(trace.frame_steps, step, side="right")) - 1
    last = len(trace.actions)
    if step < last:
        return trace.frames[index], f"{label}   step {step}", _INK
    outcome, colour = ("solved", _SOLVED) if trace.success else ("failed", _FAILED)
    return trace.frames[-1], f"{label}   {outcome} after {last} steps", colour


def _picture(
    title: str, shown: Sequence[tuple[np.ndarray, str, tuple[int, int, int]]]
) -> np.ndarray:
    draw_module, image_module, font_module = (
        _import(f"PIL.{name}") for name in ("ImageDraw", "Image", "ImageFont")
    )
    size = shown[0][0].shape[0]
    width = len(shown) * size + (len(shown) - 1) * _GAP
    height = size + 2 * _BAR
    canvas = image_module.new("RGB", (width + width % 2, height + height % 2), _PAPER)
    draw, font = draw_module.Draw(canvas), font_module.load_default(_FONT)
    draw.text((6, 4), title, fill=_INK, font=font)
    for index, (frame, caption, colour) in enumerate(shown):
        left = index * (size + _GAP)
        canvas.paste(image_module.fromarray(np.ascontiguousarray(frame)), (left, _BAR))
        draw.text((left + 6, _BAR + size + 4), caption, fill=colour, font=font)
    picture: np.ndarray = np.asarray(canvas)
    return picture


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EvaluationError(
            f"videos need PyAV and Pillow ({error}): pip install 'omega-qvla[video]'"
        ) from error
