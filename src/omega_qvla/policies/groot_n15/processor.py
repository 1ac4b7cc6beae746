"""Observations to GR00T N1.5's inputs, its outputs to raw actions (Isaac-GR00T's transforms)."""

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
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.normalization import AffineNorm
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.statistics import MinMaxNorm, Stats, pad_last
from omega_qvla.policies.tokenizer import (
    GROOT_IMAGE,
    GROOT_PAD,
    groot_prompt,
    special_id,
)
from omega_qvla.policies.tokenizer_files import TextTokenizer, read_tokenizer, save_tokenizer

#: modality (`state`, `action`) -> key -> statistics, as in `experiment_cfg/metadata.json`.
ModalityStats = Mapping[str, Mapping[str, Stats]]

DIALECTS = ("isaac", "lerobot")
#: What LeRobot says for an empty instruction (0.4.4, processor_groot.py).
DEFAULT_PROMPT = "Perform the task."
#: Instructions whose tokens are kept: a robot hears the same one for a whole episode.
KEPT_PROMPTS = 64


@dataclass(frozen=True)
class GrootOptions:
    """`processor.json`: what a checkpoint's own files do not say.

    cameras: the robot's cameras in prompt order.
    state_keys, action_keys: keys of the metadata's statistics, in channel order.
    embodiment_tag: key of the metadata; embodiment_id: row of the per-embodiment weights.
    resize: crop (centre, `crop` of each edge) and resize images of any size; otherwise they
    must have the model's size and are not cropped.
    modes: `state.<key>` or `action.<key>` -> normalization, where it is not min_max (see
    `normalization.ISAAC_MODES`; the checkpoint does not say, its data configuration does).
    dialect: whose rules hold, `isaac` or `lerobot` (0.4.4: images of any size are squashed to the
    model's, an empty instruction becomes `DEFAULT_PROMPT`).
    """

    cameras: tuple[str, ...]
    state_keys: tuple[str, ...] = ("state",)
    action_keys: tuple[str, ...] = ("action",)
    embodiment_tag: str = "new_embodiment"
    embodiment_id: int = 0
    resize: bool = False
    crop: float | None = None
    modes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dialect: str = "isaac"

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise CheckpointError(f"dialect {self.dialect!r} is not one of {', '.join(DIALECTS)}")
        known = {f"state.{key}" for key in self.state_keys}
        unknown = sorted(set(self.modes) - known - {f"action.{key}" for key in self.action_keys})
        if unknown:
            raise CheckpointError(f"modes: there is no {', '.join(unknown)}")


@dataclass(frozen=True)
class GrootInputs:
    """A batch on its way into the network.

    pixel_values: float32 [B * cameras, 3, size, size], an observation's cameras in a row;
    input_ids: int64 [B, L]; attention_mask: bool [B, L], or None if nothing is padded;
    state: float32 [B, max_state_dim]; embodiment_id: int64 [1], shared by the batch.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    state: Tensor
    embodiment_id: Tensor

    def to(self, device: torch.device) -> GrootInputs:
        """The same on another device."""
        mask = self.attention_mask
        return GrootInputs(
            self.pixel_values.to(device),
            self.input_ids.to(device),
            None if mask is None else mask.to(device),
            self.state.to(device),
            self.embodiment_id.to(device),
        )


class GrootProcessor:
    """Tokenizer, statistics and image rules of one checkpoint; all on the CPU."""

    def __init__(
        self,
        config: GrootOptions,
        model: GrootConfig,
        tokenizer: TextTokenizer,
        stats: ModalityStats,
    ) -> None:
        """Raises CheckpointError where the parts do not fit each other."""
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.stats = {modality: dict(keys) for modality, keys in stats.items()}
        self.state_norm = self._norm("state", config.state_keys)
        self.action_norm = self._norm("action", config.action_keys)
        self._pad = special_id(tokenizer, GROOT_PAD)
        self._ids: dict[str, list[int]] = {}
        self._last: tuple[tuple[str, ...], tuple[Tensor, Tensor | None]] | None = None
        self._embodiment = torch.tensor([config.embodiment_id])
        self._check()

    @classmethod
    def create(
        cls,
        model: GrootConfig,
        tokenizer: TextTokenizer,
        state: Stats,
        actions: Stats,
        cameras: Sequence[str] = ("base", "wrist"),
        **settings: Any,
    ) -> GrootProcessor:
        """A processor for a new policy with one state key and one action key."""
        stats = {"state": {"state": state}, "action": {"action": actions}}
        return cls(GrootOptions(tuple(cameras), **settings), model, tokenizer, stats)

    def _norm(self, modality: str, keys: Sequence[str]) -> MinMaxNorm | AffineNorm:
        known = self.stats.get(modality, {})
        missing = [key for key in keys if key not in known]
        if missing or not keys:
            raise CheckpointError(
                f"metadata.json lacks statistics of {modality} {', '.join(missing) or 'keys'}; "
                f"it has {', '.join(known) or 'none'}"
            )
        modes = [self.config.modes.get(f"{modality}.{key}", "min_max") for key in keys]
        if set(modes) != {"min_max"}:
            parts = [
                AffineNorm.isaac(known[key], mode, f"metadata {modality}.{key}")
                for key, mode in zip(keys, modes, strict=True)
            ]
            return AffineNorm.concatenate(parts)
        return MinMaxNorm(Stats.concatenate([known[key] for key in keys]), f"metadata {modality}")

    def _check(self) -> None:
        head, eagle = self.model.action_head, self.model.eagle
        limits = {
            "state channels": (self.state_dim, head.max_state_dim),
            "action channels": (self.action_dim, head.action_dim),
            "tokens": (self.tokenizer.get_vocab_size(), eagle.text.vocab_size),
            "embodiments": (self.config.embodiment_id + 1, head.max_num_embodiments),
        }
        for name, (have, room) in limits.items():
            if have > room:
                raise CheckpointError(f"{have} {name} do not fit the model's {room}")
        image = special_id(self.tokenizer, GROOT_IMAGE)
        if image != eagle.image_token_index:
            raise CheckpointError(
                f"the tokenizer's {GROOT_IMAGE} is {image}, the model's image_token_index "
                f"{eagle.image_token_index}"
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's cameras, in prompt order."""
        return self.config.cameras

    @property
    def state_dim(self) -> int:
        """Length of the robot's state."""
        return len(self.state_norm)

    @property
    def action_dim(self) -> int:
        """Length of the robot's action."""
        return len(self.action_norm)

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """Raw [..., state_dim] to float32 [..., max_state_dim], zeros behind."""
        return pad_last(self.state_norm.normalize(state), self.model.action_head.max_state_dim)

    def normalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Raw [..., action_dim] to float32 [..., A], zeros behind."""
        return pad_last(self.action_norm.normalize(actions), self.model.action_head.action_dim)

    def unnormalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Normalized [..., A] to raw float32 [..., action_dim]."""
        used = np.asarray(actions, np.float64)[..., : self.action_dim]
        return self.action_norm.unnormalize(used).astype(np.float32)

    def tokenize(
        self, prompts: Sequence[str], states: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Instructions to (tokens int64, mask bool) [B, L], left-padded to the longest.

        The state is not part of the prompt; `states` is there for symmetry with pi0.5.
        """
        ids = {prompt: self._encode(prompt) for prompt in prompts}
        length = max(map(len, ids.values()))
        rows = {p: [self._pad] * (length - len(row)) + row for p, row in ids.items()}
        masks = {p: [False] * (length - len(row)) + [True] * len(row) for p, row in ids.items()}
        return torch.tensor([rows[p] for p in prompts]), torch.tensor([masks[p] for p in prompts])

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of one instruction in its chat; those of the latest ones are kept."""
        known = self._ids.get(prompt)
        if known is not None:
            return known
        said = prompt or DEFAULT_PROMPT if self.config.dialect == "lerobot" else prompt
        text = groot_prompt(said, len(self.cameras), self.model.eagle.tokens_per_image)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(self._ids) >= KEPT_PROMPTS:
            self._ids.clear()
        self._ids[prompt] = ids
        return ids

    def camera_images(self, observations: Sequence[Observation], camera: str) -> Tensor:
        """One camera's images, float32 [B, 3, size, size] in [-1, 1]. Raises ObservationError."""
        size, crop = self.model.eagle.vision.image_size, self.config.crop
        stacked = image_ops.stack_images(observations, camera, None if self.config.resize else size)
        if isinstance(stacked, list) and self.config.dialect == "lerobot":
            stacked = torch.stack([image_ops.squash_bicubic(i, size) for i in stacked])
        if isinstance(stacked, list):
            stacked = torch.stack([image_ops.crop_and_resize(i, size, crop) for i in stacked])
        return image_ops.to_float(stacked)

    def prepare(self, observations: Sequence[Observation]) -> GrootInputs:
        """Check and preprocess B observations. Raises ObservationError."""
        if not observations:
            raise ObservationError("no observations: give at least one")
        states = image_ops.stack_states(observations, self.state_dim)
        images = [self.camera_images(observations, camera) for camera in self.cameras]
        # One observation's images lie as they are read: no value changes its place.
        one = len(observations) == 1
        pixels = torch.cat(images) if one else torch.stack(images, dim=1).flatten(0, 1)
        tokens, mask = self._tokens(tuple(o.prompt for o in observations))
        return GrootInputs(
            pixel_values=pixels,
            input_ids=tokens,
            attention_mask=mask,
            state=torch.from_numpy(self.normalize_state(states)),
            embodiment_id=self._embodiment,
        )

    def _tokens(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """`tokenize`, without a mask where nothing is padded; that of the last prompts is kept."""
        if self._last is None or self._last[0] != prompts:
            tokens, mask = self.tokenize(prompts)
            self._last = prompts, (tokens, None if bool(mask.all()) else mask)
        return self._last[1]

    def save(self, path: Path) -> None:
        """Write processor.json, the tokenizer and the metadata into a checkpoint."""
        size, tag = self.model.eagle.vision.image_size, self.config.embodiment_tag
        statistics = {
            modality: {key: stats.to_dict() for key, stats in keys.items()}
            for modality, keys in self.stats.items()
        }
        shapes = {
            modality: {key: {"shape": [len(s.take(key, "min")[0])], "continuous": True}
                       for key, s in keys.items()}
            for modality, keys in self.stats.items()
        }  # fmt: skip
        video = {camera: {"resolution": [size, size], "channels": 3} for camera in self.cameras}
        metadata = {"statistics": statistics, "modalities": {"video": video, **shapes}}
        write_json(_metadata_path(path), {tag: {**metadata, "embodiment_tag": tag}})
        save_tokenizer(self.tokenizer, path)
        settings = dataclasses.asdict(self.config)
        write_json(path / "processor.json", {"family": "groot_n15", **settings})

    @classmethod
    def load(cls, path: Path, model: GrootConfig) -> GrootProcessor:
        """Read what `save` writes. Raises CheckpointError."""
        config = options(GrootOptions, read_json(path / "processor.json"), "processor.json")
        stats = metadata_stats(path, read_metadata(path, config.embodiment_tag))
        return cls(config, model, read_tokenizer(path), stats)


def read_metadata(path: Path, tag: str) -> dict[str, Any]:
    """The metadata of one embodiment. Raises CheckpointError naming the file."""
    file = _metadata_path(path)
    metadata = read_json(file)
    if not isinstance(metadata.get(tag), dict):
        raise CheckpointError(
            f"{file} has no embodiment {tag!r}; it has {', '.join(metadata) or 'none'}: say which "
            "one the robot is (setting `embodiment_tag`, --settings)"
        )
    entry: dict[str, Any] = metadata[tag]
    return entry


def metadata_stats(path: Path, entry: Mapping[str, Any]) -> dict[str, dict[str, Stats]]:
    """`state` and `action` -> key -> statistics. Raises CheckpointError on broken ones."""
    statistics = entry.get("statistics", {})
    return {
        modality: {
            key: Stats.from_dict(values, f"{_metadata_path(path)} {modality}.{key}")
            for key, values in statistics.get(modality, {}).items()
        }
        for modality in ("state", "action")
    }


def _metadata_path(path: Path) -> Path:
    return path / "experiment_cfg" / "metadata.json"
