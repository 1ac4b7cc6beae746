"""Sizes of a pi0.5 model and the checkpoint's config.json.

openpi writes {action_dim, action_horizon, paligemma_variant, action_expert_variant,
precision}, where a variant is a name for fixed sizes. Smaller models use the same file with a
dict of sizes in place of the name, and say `vision` and `vocab_size` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from omega_qvla.errors import ConfigError
from omega_qvla.policies.siglip import SIGLIP_SO400M, SiglipConfig

__all__ = ["GEMMA_VARIANTS", "GemmaConfig", "Pi05Config", "SiglipConfig"]

PALIGEMMA_VOCAB_SIZE = 257152
IMAGE_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

# Keys that checkpoints carry and the network does not need: pre- and post-processing, training.
IGNORED_KEYS = frozenset(
    {
        "asset_id",
        "discrete_state_input",
        "dtype",
        "image_resolution",
        "model_type",
        "pi05",
        "pytorch_compile_mode",
        "type",
    }
)


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one Gemma stack (the language model or the action expert)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"gemma: {field.name} must be positive")
        if self.head_dim % 2 or self.width % 2:
            raise ConfigError("gemma: head_dim (RoPE) and width (time sinusoid) must be even")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"gemma: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )


GEMMA_VARIANTS = {
    "gemma_2b": GemmaConfig(2048, 18, 16384, 8, 1, 256),
    "gemma_300m": GemmaConfig(1024, 18, 4096, 8, 1, 256),
}

T = TypeVar("T", GemmaConfig, SiglipConfig)


def _sizes(cls: type[T], value: Any, what: str) -> T:
    """Build `cls` from a dict of sizes, naming what is missing or unknown."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what}: expected a dict of sizes, got {value!r}")
    try:
        return cls(**value)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from None


def _gemma(value: Any, what: str) -> GemmaConfig:
    if isinstance(value, str):
        if value not in GEMMA_VARIANTS:
            raise ConfigError(
                f"{what}: unknown variant {value!r}: use one of {sorted(GEMMA_VARIANTS)} "
                "or a dict of sizes"
            )
        return GEMMA_VARIANTS[value]
    return _sizes(GemmaConfig, value, what)


def _variant(config: GemmaConfig) -> str | dict[str, int]:
    for name, known in GEMMA_VARIANTS.items():
        if config == known:
            return name
    return asdict(config)


@dataclass(frozen=True)
class Pi05Config:
    """Everything that fixes the network; defaults are those of the published checkpoints.

    `max_token_len` counts language tokens; `image_slots` are the cameras in prefix order;
    `precision` is the dtype of the tensors in the checkpoint file; `time_grid` says how the flow
    times are computed: `accumulated` in float32 as openpi does, or `exact` as LeRobot does.
    """

    vision: SiglipConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int
    action_horizon: int
    max_token_len: int
    num_inference_steps: int = 10
    image_slots: tuple[str, ...] = IMAGE_SLOTS
    precision: str = "float32"
    time_grid: str = "accumulated"

    def __post_init__(self) -> None:
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            vlm, expert = getattr(self.vlm, name), getattr(self.expert, name)
            if vlm != expert:
                raise ConfigError(
                    f"the expert attends to the language model's keys: {name} must agree, "
                    f"got {vlm} and {expert}"
                )
        for name in ("vocab_size", "action_dim", "action_horizon", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_token_len < 0:
            raise ConfigError(f"max_token_len must not be negative, got {self.max_token_len}")
        if not self.image_slots or len(set(self.image_slots)) != len(self.image_slots):
            raise ConfigError(f"image_slots must be distinct names, got {self.image_slots}")
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"unknown precision {self.precision!r}")
        if self.time_grid not in ("accumulated", "exact"):
            raise ConfigError(f"unknown time_grid {self.time_grid!r}: accumulated or exact")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pi05Config:
        """Read a config.json.

        Raises:
            ConfigError: a required key is missing, a key is unknown, or a value impossible.
        """
        rest = {key: value for key, value in data.items() if key not in IGNORED_KEYS}
        try:
            config = cls(
                vision=_sizes(SiglipConfig, rest.pop("vision", asdict(SIGLIP_SO400M)), "vision"),
                vlm=_gemma(rest.pop("paligemma_variant"), "paligemma_variant"),
                expert=_gemma(rest.pop("action_expert_variant"), "action_expert_variant"),
                vocab_size=rest.pop("vocab_size", PALIGEMMA_VOCAB_SIZE),
                action_dim=rest.pop("action_dim"),
                action_horizon=rest.pop("action_horizon"),
                max_token_len=rest.pop("max_token_len", 200),
                num_inference_steps=rest.pop("num_inference_steps", 10),
                image_slots=tuple(rest.pop("image_slots", IMAGE_SLOTS)),
                precision=rest.pop("precision", "float32"),
                time_grid=rest.pop("time_grid", "accumulated"),
            )
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error}") from None
        if rest:
            raise ConfigError(f"config.json has keys unknown to pi0.5: {sorted(rest)}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json that `from_dict` reads back to an equal config."""
        data: dict[str, Any] = {
            "action_dim": self.action_dim,
            "action_horizon": self.action_horizon,
            "paligemma_variant": _variant(self.vlm),
            "action_expert_variant": _variant(self.expert),
            "precision": self.precision,
        }
        optional = {
            "vision": (asdict(self.vision), asdict(SIGLIP_SO400M)),
            "vocab_size": (self.vocab_size, PALIGEMMA_VOCAB_SIZE),
            "max_token_len": (self.max_token_len, 200),
            "num_inference_steps": (self.num_inference_steps, 10),
            "image_slots": (list(self.image_slots), list(IMAGE_SLOTS)),
            "time_grid": (self.time_grid, "accumulated"),
        }
        return data | {k: value for k, (value, default) in optional.items() if value != default}
