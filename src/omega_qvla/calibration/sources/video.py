"""Single frames of a video, found by seeking: what is not sampled is not decoded."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.calibration.sources.base import require
from omega_qvla.errors import CalibrationError

#: A video's own rate may be rounded (29.97 for 30), not wrong.
_RATE_TOLERANCE = 0.01


def read_frames(
    path: Path, indices: Iterable[int], fps: float, *, at_least: int = 0, exactly: int | None = None
) -> dict[int, np.ndarray]:
    """Frames by their number from the start of the file, uint8 [height, width, 3] RGB.

    For each one, decoding starts at the key frame before it and ends with it.

    Args:
        fps: frames per second that the dataset announces.
        at_least, exactly: frames that the file must have, where its header says how many.

    Raises:
        CalibrationError: missing, truncated, another frame rate, or another number of frames.
    """
    av = require("av", "reading a dataset's videos")
    found: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CalibrationError(f"{path}: holds no video")
            stream = container.streams.video[0]
            _check(path, stream, fps, at_least, exactly)
            for index in sorted(set(indices)):
                found[index] = _frame(path, container, stream, index, fps)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such file; the dataset is incomplete") from error
    except av.error.FFmpegError as error:
        raise CalibrationError(f"{path}: truncated or no video: {error}") from error
    return found


def read_image(data: bytes, where: str) -> np.ndarray:
    """One encoded image (PNG, JPEG) as uint8 [height, width, 3] RGB.

    Raises:
        CalibrationError: truncated, or no image.
    """
    av = require("av", "reading a dataset's images")
    try:
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
            image: np.ndarray = frame.to_ndarray(format="rgb24")
            return image
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise CalibrationError(f"{where}: a truncated image, or none: {error}") from error


def _check(path: Path, stream: Any, fps: float, at_least: int, exactly: int | None) -> None:
    rate = float(stream.average_rate or 0)
    if rate and abs(rate - fps) > _RATE_TOLERANCE * fps:
        raise CalibrationError(
            f"{path}: {rate:g} frames per second, but the dataset's info.json says {fps:g}"
        )
    frames = int(stream.frames)  # 0 where the container does not say
    if frames and (frames < at_least or frames != (exactly or frames)):
        wanted = f"at least {at_least}" if exactly is None else str(exactly)
        raise CalibrationError(
            f"{path}: {frames} frames, but its episodes announce {wanted}: truncated, or of "
            "another recording"
        )


def _frame(path: Path, container: Any, stream: Any, index: int, fps: float) -> np.ndarray:
    time_base = float(stream.time_base)
    target = (stream.start_time or 0) + index / fps / time_base
    half = 0.5 / fps / time_base
    container.seek(max(round(target), 0), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts < target - half:
            continue
        if frame.pts > target + half:
            break
        image: np.ndarray = frame.to_ndarray(format="rgb24")
        return image
    raise CalibrationError(
        f"{path}: there is no frame {index} ({index / fps:g} s): the video is truncated"
    )
