"""Camera images on their way into a vision tower: checks, resizing, scaling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from omega_qvla.errors import ObservationError
from omega_qvla.policies.observation import Observation


def stack_images(
    observations: Sequence[Observation], camera: str, size: int | None
) -> list[Tensor] | Tensor:
    """The images of one camera as uint8.

    Args:
        observations: B of them.
        camera: key of `Observation.images`.
        size: edge that every image must have; None if they will be resized.

    Returns:
        [B, size, size, 3], or with size None a list of B tensors [height, width, 3].

    Raises:
        ObservationError: a camera is missing, or an image has a wrong shape or dtype.
    """
    images = []
    for observation in observations:
        if camera not in observation.images:
            have = ", ".join(sorted(observation.images)) or "none"
            raise ObservationError(f"camera {camera!r} is missing; the observation has: {have}")
        image = np.asarray(observation.images[camera])
        wanted = f"uint8 [{size}, {size}, 3]" if size else "uint8 [height, width, 3]"
        fits = image.ndim == 3 and image.shape[-1] == 3 and 0 not in image.shape
        fits = fits and (size is None or image.shape[:2] == (size, size))
        if not fits or image.dtype != np.uint8:
            raise ObservationError(
                f"camera {camera!r}: got {image.dtype} {list(image.shape)}, wanted {wanted}"
            )
        images.append(torch.from_numpy(np.ascontiguousarray(image)))
    return images if size is None else torch.stack(images)


def stack_states(observations: Sequence[Observation], state_dim: int) -> np.ndarray:
    """States as float64 [B, state_dim]. Raises ObservationError: wrong length, not finite."""
    states = []
    for observation in observations:
        state = np.asarray(observation.state)
        if state.shape != (state_dim,) or state.dtype.kind not in "fiu":
            raise ObservationError(
                f"state: got {state.dtype} {list(state.shape)}, wanted float [{state_dim}]"
            )
        if not np.isfinite(state).all():
            bad = np.flatnonzero(~np.isfinite(state)).tolist()
            raise ObservationError(f"state: entries {bad} are not finite")
        states.append(state.astype(np.float64))
    return np.stack(states)


def to_float(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1].

    Both families scale alike: openpi's x / 255 * 2 - 1 is GR00T's (x / 255 - 0.5) / 0.5.
    """
    return images.movedim(-1, -3).float().div_(127.5).sub_(1.0)


def resize_with_pad(image: Tensor, size: int) -> Tensor:
    """Fit uint8 [h, w, 3] into [size, size, 3], black borders (openpi-client image_tools).

    Bilinear with antialiasing, rounded, as Pillow does it.
    """
    height, width = image.shape[:2]
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    if (new_height, new_width) == (height, width):
        resized = image
    else:
        resized = _resize(image, new_height, new_width).round_().clamp_(0, 255).to(torch.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas = torch.zeros((size, size, 3), dtype=torch.uint8)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def lerobot_resize(image: Tensor, size: int, border: float) -> Tensor:
    """LeRobot's fit of uint8 [h, w, 3] for pi0.5: float32 [3, size, size] in [-1, 1].

    Bilinear without antialiasing, not rounded (pi05/modeling_pi05.py, resize_with_pad_torch);
    `border` is what the padding is in the end.
    """
    height, width = image.shape[:2]
    planes = image.movedim(-1, 0).float().div(255)
    if (height, width) == (size, size):
        return planes.mul_(2).sub_(1)
    ratio = max(height / size, width / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    resized = functional.interpolate(planes[None], (new_height, new_width), mode="bilinear")[0]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas = torch.full((3, size, size), border)
    canvas[:, top : top + new_height, left : left + new_width] = resized.mul(2).sub_(1)
    return canvas


def squash_bicubic(image: Tensor, size: int) -> Tensor:
    """The Eagle processor's one tile of uint8 [h, w, 3]: uint8 [size, size, 3].

    Antialiased bicubic, the aspect ratio given up, rounded. LeRobot's groot leaves resizing to
    it; Isaac-GR00T crops and resizes before.
    """
    if tuple(image.shape[:2]) == (size, size):
        return image
    planes = image.movedim(-1, 0)[None].float()
    resized = functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return resized[0].movedim(0, -1).round().clamp(0, 255).to(torch.uint8)


def crop_and_resize(image: Tensor, size: int, crop: float | None) -> Tensor:
    """GR00T's evaluation transform of uint8 [h, w, 3]: uint8 [size, size, 3].

    Centre crop to int(edge * crop) pixels, antialiased bilinear resize, truncation to uint8.
    """
    height, width = image.shape[:2]
    if crop is not None:
        kept_height, kept_width = int(height * crop), int(width * crop)
        # torchvision's center_crop rounds the offset half to even.
        top, left = round((height - kept_height) / 2), round((width - kept_width) / 2)
        image = image[top : top + kept_height, left : left + kept_width]
    resized = _resize(image, size, size).div_(255).clamp_(0, 1)
    return resized.mul_(255).to(torch.uint8)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """[h, w, 3] to float32 [height, width, 3], antialiased bilinear."""
    planes = image.movedim(-1, 0)[None].float()
    resized = functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized[0].movedim(0, -1)
