"""Observations to pi0.5's inputs, its outputs to raw actions (openpi's transforms)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import CheckpointError, ObservationError
from omega_qvla.policies import images as image_ops
from omega_qvla.policies.files import options, read_json, write_json
from omega_qvla.policies.normalization import AffineNorm
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.statistics import FIELDS, QuantileNorm, Stats, pad_last
from omega_qvla.policies.tokenizer import pi05_prompt, special_id, state_bins
from omega_qvla.policies.tokenizer_files import TextTokenizer, read_tokenizer, save_tokenizer

DIALECTS = ("openpi", "lerobot")
STATS_FIELDS = ("mean", "std", "q01", "q99")


@dataclass(frozen=True)
class Pi05Options:
    """`processor.json`: what a checkpoint's own files do not say.

    cameras: image slot -> the robot's camera, or None where the slot is never filled.
    discrete_state_input: whether the state is written into the prompt.
    resize: fit images of any size into the model's; otherwise they must have it.
    asset_id: directory of `norm_stats.json` under `assets/`.
    dialect: whose rules hold, `openpi` or `lerobot` (0.4.4). The rest is LeRobot's alone:
    prompt_state_dim: the state is padded with zeros to this length before it is discretised.
    border: value of the network's input where resizing pads; LeRobot fills -1 before it maps
    [0, 1] to [-1, 1], which gives -3.
    state_mode, action_mode: normalization, see `normalization.LEROBOT_MODES`.
    epsilon: of the normalizer step.
    """

    cameras: Mapping[str, str | None]
    state_dim: int
    action_dim: int
    discrete_state_input: bool = True
    resize: bool = False
    asset_id: str = "demo"
    dialect: str = "openpi"
    prompt_state_dim: int | None = None
    border: float = -1.0
    state_mode: str = "quantiles"
    action_mode: str = "quantiles"
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise CheckpointError(f"dialect {self.dialect!r} is not one of {', '.join(DIALECTS)}")
        padded = self.prompt_state_dim
        if padded is not None and padded < self.state_dim:
            raise CheckpointError(
                f"{self.state_dim} state channels do not fit a prompt of {padded}"
            )


@dataclass(frozen=True)
class Pi05Inputs:
    """A batch on its way into the network.

    images: per slot float32 [B, 3, size, size]; image_masks: per slot bool [B];
    tokens: int64 [B, L]; token_mask: bool [B, L].
    """

    images: tuple[Tensor, ...]
    image_masks: tuple[Tensor, ...]
    tokens: Tensor
    token_mask: Tensor

    def to(self, device: torch.device) -> Pi05Inputs:
        """The same on another device."""
        return Pi05Inputs(
            tuple(image.to(device) for image in self.images),
            tuple(mask.to(device) for mask in self.image_masks),
            self.tokens.to(device),
            self.token_mask.to(device),
        )


class Pi05Processor:
    """Tokenizer, statistics and image rules of one checkpoint; all on the CPU."""

    def __init__(
        self,
        config: Pi05Options,
        model: Pi05Config,
        tokenizer: TextTokenizer,
        stats: Mapping[str, Stats],
    ) -> None:
        """`stats` has the keys `state` and `actions`. Raises CheckpointError on a misfit."""
        self.config, self.model, self.tokenizer, self.stats = config, model, tokenizer, dict(stats)
        missing = {"state", "actions"} - set(stats)
        if missing:
            raise CheckpointError(f"norm_stats.json lacks {', '.join(sorted(missing))}")
        self.state_norm = self._norm("state", config.state_mode, config.state_dim)
        self.action_norm = self._norm("actions", config.action_mode, config.action_dim)
        self._bos = special_id(tokenizer, "<bos>")
        self._check()

    @classmethod
    def create(
        cls,
        model: Pi05Config,
        tokenizer: TextTokenizer,
        state: Stats,
        actions: Stats,
        cameras: Sequence[str] = ("base", "wrist"),
        **settings: Any,
    ) -> Pi05Processor:
        """A processor for a new policy: `cameras` fill the image slots in order."""
        padded = [*cameras, *[None] * (len(model.image_slots) - len(cameras))]
        slots = dict(zip(model.image_slots, padded, strict=True))
        state_dim = len(state.take("state", "q01")[0])
        action_dim = len(actions.take("actions", "q01")[0])
        config = Pi05Options(slots, state_dim, action_dim, **settings)
        return cls(config, model, tokenizer, {"state": state, "actions": actions})

    def _norm(self, name: str, mode: str, width: int) -> QuantileNorm | AffineNorm:
        where, stats = f"norm_stats {name}", self.stats[name]
        if self.config.dialect == "lerobot":
            return AffineNorm.lerobot(stats, mode, where, width, self.config.epsilon)
        return QuantileNorm(stats, where)

    def _check(self) -> None:
        config, model = self.config, self.model
        if set(config.cameras) != set(model.image_slots):
            raise CheckpointError(
                f"processor.json names the slots {', '.join(config.cameras)}, the model has "
                f"{', '.join(model.image_slots)}"
            )
        sizes = {"state": (len(self.state_norm), config.state_dim)}
        sizes["actions"] = (len(self.action_norm), config.action_dim)
        for name, (have, want) in sizes.items():
            if have != want:
                raise CheckpointError(f"statistics of {name} have {have} channels, not {want}")
        if config.action_dim > model.action_dim:
            raise CheckpointError(
                f"{config.action_dim} action channels do not fit the model's {model.action_dim}"
            )
        # Added tokens may lie beyond: PaliGemma's `<image>` does, and no prompt has it.
        tokens = self.tokenizer.get_vocab_size(with_added_tokens=False)
        if tokens > model.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokens} tokens, the model {model.vocab_size}"
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's cameras, in slot order."""
        slots = [self.config.cameras[slot] for slot in self.model.image_slots]
        return tuple(camera for camera in slots if camera is not None)

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """Raw [..., state_dim] to float32 of the same shape, quantiles to [-1, 1]."""
        return self.state_norm.normalize(state).astype(np.float32)

    def normalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Raw [..., action_dim] to float32 [..., A], zeros behind."""
        return pad_last(self.action_norm.normalize(actions), self.model.action_dim)

    def unnormalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Normalized [..., A] to raw float32 [..., action_dim]."""
        used = np.asarray(actions, np.float64)[..., : self.config.action_dim]
        return self.action_norm.unnormalize(used).astype(np.float32)

    def tokenize(self, prompts: Sequence[str], states: np.ndarray) -> tuple[Tensor, Tensor]:
        """Instructions and raw states [B, state_dim] to (tokens int64, mask bool) [B, L].

        Words that the vocabulary lacks become <unk>. Right-padded to the model's length.

        Raises:
            ObservationError: a prompt is longer than the model reads.
        """
        bins: list[list[int] | None] = [None] * len(prompts)
        if self.config.discrete_state_input:
            bins = list(state_bins(self._prompt_state(states)).tolist())
        texts = [pi05_prompt(text, b) for text, b in zip(prompts, bins, strict=True)]
        length = self.model.max_token_len
        tokens = torch.zeros((len(texts), length), dtype=torch.int64)
        mask = torch.zeros((len(texts), length), dtype=torch.bool)
        for row, text in enumerate(texts):
            ids = [self._bos, *self._encode(text, whole=bins[row] is not None)]
            if len(ids) > length:
                raise ObservationError(
                    f"prompt {prompts[row]!r} takes {len(ids)} tokens, the model reads {length}: "
                    "shorten the instruction"
                )
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        return tokens, mask

    def _prompt_state(self, states: np.ndarray) -> np.ndarray:
        """Normalized states [B, state_dim], padded with zeros (bin 128) as LeRobot does."""
        normed = self.state_norm.normalize(states)
        width = self.config.prompt_state_dim
        return normed if width is None else pad_last(normed, width)

    def _encode(self, text: str, whole: bool) -> list[int]:
        """Ids of a prompt. Without a state openpi encodes the final newline by itself.

        Raises:
            ObservationError: the text has a token that the model does not know.
        """
        parts = [text] if whole else [text.removesuffix("\n"), "\n"]
        encoded = [self.tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
        ids = [token for part in encoded for token in part]
        if max(ids, default=0) >= self.model.vocab_size:
            raise ObservationError(
                f"prompt {text!r} has a token beyond the model's {self.model.vocab_size}"
            )
        return ids

    def camera_images(self, observations: Sequence[Observation], camera: str) -> Tensor:
        """One camera's images, float32 [B, 3, size, size] in [-1, 1]. Raises ObservationError."""
        size = self.model.vision.image_size
        stacked = image_ops.stack_images(observations, camera, None if self.config.resize else size)
        if isinstance(stacked, list) and self.config.dialect == "lerobot":
            border = self.config.border
            return torch.stack([image_ops.lerobot_resize(i, size, border) for i in stacked])
        if isinstance(stacked, list):
            stacked = torch.stack([image_ops.resize_with_pad(image, size) for image in stacked])
        return image_ops.to_float(stacked)

    def prepare(self, observations: Sequence[Observation]) -> Pi05Inputs:
        """Check and preprocess B observations. Raises ObservationError."""
        batch, size = len(observations), self.model.vision.image_size
        if batch == 0:
            raise ObservationError("no observations: give at least one")
        states = image_ops.stack_states(observations, self.config.state_dim)
        images, masks = [], []
        for slot in self.model.image_slots:
            camera = self.config.cameras[slot]
            masks.append(torch.full((batch,), camera is not None))
            if camera is None:
                images.append(torch.full((batch, 3, size, size), -1.0))
            else:
                images.append(self.camera_images(observations, camera))
        tokens, mask = self.tokenize([o.prompt for o in observations], states)
        return Pi05Inputs(tuple(images), tuple(masks), tokens, mask)

    def save(self, path: Path) -> None:
        """Write processor.json, the tokenizer and the statistics into a checkpoint."""
        fields = STATS_FIELDS if self.config.dialect == "openpi" else FIELDS
        stats = {name: stats.to_dict(fields) for name, stats in self.stats.items()}
        write_json(_stats_path(path, self.config.asset_id), {"norm_stats": stats})
        save_tokenizer(self.tokenizer, path)
        write_json(path / "processor.json", {"family": "pi05", **dataclasses.asdict(self.config)})

    @classmethod
    def load(cls, path: Path, model: Pi05Config) -> Pi05Processor:
        """Read what `save` writes. Raises CheckpointError."""
        config = options(Pi05Options, read_json(path / "processor.json"), "processor.json")
        return cls(config, model, read_tokenizer(path), read_norm_stats(path, config.asset_id))


def read_norm_stats(path: Path, asset_id: str) -> dict[str, Stats]:
    """openpi's statistics: `state` and `actions`. Raises CheckpointError naming the file."""
    file = _stats_path(path, asset_id)
    listed = read_json(file).get("norm_stats")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{file} has no norm_stats")
    return {name: Stats.from_dict(values, f"{file} {name}") for name, values in listed.items()}


def _stats_path(path: Path, asset_id: str) -> Path:
    return path / "assets" / asset_id / "norm_stats.json"
