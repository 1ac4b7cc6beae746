"""Demonstration shards in memory: observations, action chunks cut at any step, augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

#: Columns of the simulator's own observation that hold the position of the task's object.
OBJECT_POSITION = slice(4, 7)


@dataclass(frozen=True)
class Demonstrations:
    """All rendered steps of a set of episodes.

    images_base, images_wrist: uint8 [n, 3, H, W]; state float32 [n, S];
    objects float32 [n, 3] (object position, metres); chunks float32 [n, horizon, A], the
    expert's labels from that step on (the last one repeated past the episode's end);
    task int64 [n] (index into `prompts`); held_out bool [n].
    rendered: edge in which the simulator rendered, before the pictures were shrunk to theirs.
    """

    images_base: np.ndarray
    images_wrist: np.ndarray
    state: np.ndarray
    objects: np.ndarray
    chunks: np.ndarray
    task: np.ndarray
    held_out: np.ndarray
    prompts: tuple[str, ...]
    rendered: int

    def __len__(self) -> int:
        return len(self.state)

    @property
    def shrunk(self) -> bool:
        """Whether the policy must shrink what it is shown, as the pictures here were."""
        return self.rendered != self.images_base.shape[-1]


def _chunks(shard: dict[str, np.ndarray], horizon: int) -> np.ndarray:
    """float32 [n, horizon, A]: the labels that follow each rendered step."""
    first = shard["offsets"][shard["episode"]] + shard["step"]
    last = shard["offsets"][shard["episode"] + 1] - 1
    rows = np.minimum(first[:, None] + np.arange(horizon), last[:, None])
    cut: np.ndarray = shard["actions"][rows]
    return cut


def load_demonstrations(folder: Path, horizon: int, held_out_every: int = 25) -> Demonstrations:
    """Read every shard of `folder`; one episode in `held_out_every` is kept for validation.

    Raises:
        FileNotFoundError: the folder holds no shard.
        ValueError: its shards were rendered in different sizes.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no shards; run training/collect.py first")
    prompts: list[str] = []
    rendered: set[int] = set()
    parts: dict[str, list[np.ndarray]] = {}
    for path in paths:
        with np.load(path) as file:
            shard = {key: file[key] for key in file.files}
        prompt = str(shard["prompt"])
        rendered.add(int(shard.get("rendered", shard["images_base"].shape[1])))
        if prompt not in prompts:
            prompts.append(prompt)
        rows = {
            "images_base": shard["images_base"].transpose(0, 3, 1, 2),
            "images_wrist": shard["images_wrist"].transpose(0, 3, 1, 2),
            "state": shard["state"],
            "objects": shard["raw"][:, OBJECT_POSITION],
            "chunks": _chunks(shard, horizon),
            "task": np.full(len(shard["step"]), prompts.index(prompt)),
            "held_out": (shard["episode"] + shard.get("first", 0)) % held_out_every
            == held_out_every - 1,
        }
        for key, value in rows.items():
            parts.setdefault(key, []).append(value)
    if len(rendered) > 1:
        raise ValueError(f"{folder}: pictures were rendered in {sorted(rendered)} pixels; keep one")
    arrays = {key: np.ascontiguousarray(np.concatenate(value)) for key, value in parts.items()}
    return Demonstrations(**arrays, prompts=tuple(prompts), rendered=rendered.pop())


def augment(images: Tensor, rng: torch.Generator, shift: int = 4, light: float = 0.15) -> Tensor:
    """Random shift (pixels, edges repeated), brightness and contrast, drawn per image.

    Args:
        images: float [B, 3, H, W] in [0, 1].

    Returns:
        Same shape, clamped to [0, 1].
    """
    batch, _, height, width = images.shape
    padded = pad(images, (shift,) * 4, mode="replicate")
    draw = torch.randint(0, 2 * shift + 1, (batch, 2), generator=rng)
    rows = draw[:, 0, None] + torch.arange(height)
    columns = draw[:, 1, None] + torch.arange(width)
    index = torch.arange(batch)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    gain = 1 + light * (2 * torch.rand(batch, 1, 1, 1, generator=rng) - 1)
    offset = light * (2 * torch.rand(batch, 1, 1, 1, generator=rng) - 1)
    return (shifted.permute(0, 3, 1, 2) * gain + offset).clamp(0, 1)
