"""Sizes of a GR00T N1.5 model, read from and written to a checkpoint's `config.json`.

Every dataclass keeps the keys it does not use in `extra`, so that a configuration survives
being read and written. The published `config.json` does not hold the sizes of the vision and
language models (they are fixed by the release); other sizes are carried by the additional key
`eagle_cfg`, and its absence means the published sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omega_qvla.errors import ConfigError
from omega_qvla.policies.siglip import SiglipConfig

MODEL_TYPE = "gr00t_n1_5"


def _extra() -> Any:
    return field(default_factory=dict, hash=False, repr=False)


def _known(cls: type, data: Mapping[str, Any], nested: tuple[str, ...] = ()) -> dict[str, Any]:
    """Constructor arguments of `cls` from `data`; keys that it does not know go to `extra`."""
    names = {f.name for f in fields(cls)} - {"extra"}
    known = {k: v for k, v in data.items() if k in names}
    extra = {k: v for k, v in data.items() if k not in names and k not in nested}
    return {**known, "extra": extra}


def _plain(config: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    own = {
        f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("extra", *skip)
    }
    return {**config.extra, **own}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ConfigError(f"GR00T N1.5 config: {what}")


@dataclass(frozen=True)
class Qwen3Config:
    """The language model (keys as in the Hugging Face `qwen3` config)."""

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151680
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    attention_bias: bool = False
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        _require(heads % kv == 0, f"{heads} query heads do not divide over {kv} key heads")
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary needs pairs")
        act = self.extra.get("hidden_act", "silu")
        _require(act == "silu", f"hidden_act {act!r}; only 'silu' is implemented")
        _require(not self.extra.get("use_sliding_window"), "sliding windows are not implemented")
        _require(not self.extra.get("rope_scaling"), "rope_scaling is not implemented")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Qwen3Config:
        return cls(**_known(cls, data))

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)


def _true_vision() -> SiglipConfig:
    return SiglipConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        layer_norm_eps=1e-6,
    )


@dataclass(frozen=True)
class EagleConfig:
    """The vision-language model; the defaults are those of the published N1.5."""

    vision: SiglipConfig = field(default_factory=_true_vision)
    text: Qwen3Config = field(default_factory=Qwen3Config)
    use_pixel_shuffle: bool = False
    downsample_ratio: float = 0.5
    mlp_connector_layers: int = 1
    image_token_index: int = 151669
    select_layer: int = -1
    vision_extra: Mapping[str, Any] = _extra()
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        layers = self.mlp_connector_layers
        _require(layers in (1, 2), f"mlp_connector_layers {layers}; 1 and 2 are implemented")
        _require(self.select_layer == -1, "eagle select_layer must be -1 (the last vision layer)")
        side = self.vision.image_size // self.vision.patch_size
        fits = not self.use_pixel_shuffle or side % self.shuffle_factor == 0
        _require(fits, f"{side} patches a side do not divide by {self.shuffle_factor}")

    @property
    def shuffle_factor(self) -> int:
        """Patches per side that pixel shuffle joins into one token (1: no shuffle)."""
        return round(1 / self.downsample_ratio) if self.use_pixel_shuffle else 1

    @property
    def connector_dim(self) -> int:
        """Width of what enters `mlp1`."""
        return self.vision.hidden_size * self.shuffle_factor**2

    @property
    def tokens_per_image(self) -> int:
        side = self.vision.image_size // self.vision.patch_size
        return (side // self.shuffle_factor) ** 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EagleConfig:
        for key in ("vision_config", "text_config"):
            _require(key in data, f"eagle_cfg lacks {key!r}")
        vision = dict(data["vision_config"])
        act = vision.get("hidden_act", "gelu_pytorch_tanh")
        _require(act == "gelu_pytorch_tanh", f"vision hidden_act {act!r} is not implemented")
        sizes = {k: vision.pop(k) for k in _VISION_KEYS if k in vision}
        known = _known(cls, data, nested=("vision_config", "text_config"))
        return cls(
            vision=SiglipConfig(**sizes),
            text=Qwen3Config.from_dict(data["text_config"]),
            vision_extra=vision,
            **known,
        )

    def to_dict(self) -> dict[str, Any]:
        vision = {k: getattr(self.vision, k) for k in _VISION_KEYS}
        plain = _plain(self, skip=("vision", "text", "vision_extra"))
        nested = {
            "vision_config": {**self.vision_extra, **vision},
            "text_config": self.text.to_dict(),
        }
        return {**plain, **nested}


@dataclass(frozen=True)
class BackboneConfig:
    """`backbone_cfg`: how many language layers are kept, and an optional projection."""

    select_layer: int = 12
    project_to_dim: int | None = None
    extra: Mapping[str, Any] = _extra()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BackboneConfig:
        return cls(**_known(cls, data))

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True)
class TransformerConfig:
    """`diffusion_model_cfg` and `vl_self_attention_cfg` (dropout is off: inference sizes only)."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    cross_attention_dim: int | None = None
    output_dim: int | None = None
    interleave_self_attention: bool = False
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        expected = {
            "positional_embeddings": (None,),
            "norm_type": ("ada_norm", "layer_norm"),
            "activation_fn": ("gelu-approximate",),
            "attention_bias": (True,),
        }
        for key, allowed in expected.items():
            value = self.extra.get(key, allowed[0])
            _require(value in allowed, f"{key} {value!r}; implemented: {allowed}")

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TransformerConfig:
        return cls(**_known(cls, data))

    def to_dict(self) -> dict[str, Any]:
        unset = [k for k in ("cross_attention_dim", "output_dim") if getattr(self, k) is None]
        skip = (*unset, *(() if self.interleave_self_attention else ("interleave_self_attention",)))
        return _plain(self, skip=skip)


def _true_dit() -> TransformerConfig:
    extra = {"norm_type": "ada_norm", "final_dropout": True, "dropout": 0.2}
    extra["positional_embeddings"] = None
    return TransformerConfig(16, 32, 48, 2048, 1024, True, extra)


def _true_vl() -> TransformerConfig:
    extra = {"final_dropout": True, "dropout": 0.2, "positional_embeddings": None}
    return TransformerConfig(4, 32, 64, extra=extra)


@dataclass(frozen=True)
class ActionHeadConfig:
    """`action_head_cfg`; the defaults are those of the published N1.5."""

    action_dim: int = 32
    action_horizon: int = 16
    backbone_embedding_dim: int = 2048
    hidden_size: int = 1024
    input_embedding_dim: int = 1536
    max_state_dim: int = 64
    max_num_embodiments: int = 32
    max_seq_len: int = 1024
    num_inference_timesteps: int = 4
    num_target_vision_tokens: int = 32
    num_timestep_buckets: int = 1000
    add_pos_embed: bool = True
    use_vlln: bool = True
    diffusion: TransformerConfig = field(default_factory=_true_dit)
    vl_self_attention: TransformerConfig = field(default_factory=_true_vl)
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        dit, width = self.diffusion, self.input_embedding_dim
        _require(dit.inner_dim == width, f"DiT heads give {dit.inner_dim}, tokens are {width}")
        _require(dit.output_dim == self.hidden_size, "DiT output_dim must equal hidden_size")
        vl, features = self.vl_self_attention.inner_dim, self.backbone_embedding_dim
        _require(not self.use_vlln or vl == features, f"vl_self_attention {vl} != {features}")
        cross = dit.cross_attention_dim
        _require(cross in (None, features), f"cross_attention_dim {cross} != {features}")
        _require(width % 2 == 0, f"input_embedding_dim {width} is odd; the time code needs pairs")
        fits = not self.add_pos_embed or self.action_horizon <= self.max_seq_len
        _require(fits, f"action_horizon {self.action_horizon} exceeds {self.max_seq_len} positions")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActionHeadConfig:
        for key in ("diffusion_model_cfg", "vl_self_attention_cfg"):
            _require(key in data, f"action_head_cfg lacks {key!r}")
        return cls(
            diffusion=TransformerConfig.from_dict(data["diffusion_model_cfg"]),
            vl_self_attention=TransformerConfig.from_dict(data["vl_self_attention_cfg"]),
            **_known(cls, data, nested=("diffusion_model_cfg", "vl_self_attention_cfg")),
        )

    def to_dict(self) -> dict[str, Any]:
        nested = {
            "diffusion_model_cfg": self.diffusion.to_dict(),
            "vl_self_attention_cfg": self.vl_self_attention.to_dict(),
        }
        return {**_plain(self, skip=("diffusion", "vl_self_attention")), **nested}


@dataclass(frozen=True)
class GrootConfig:
    """The whole model; `GrootConfig()` is the published N1.5."""

    action_dim: int = 32
    action_horizon: int = 16
    hidden_size: int = 2048
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    action_head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    eagle: EagleConfig = field(default_factory=EagleConfig)
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        width = self.backbone.project_to_dim or self.eagle.text.hidden_size
        expected = self.action_head.backbone_embedding_dim
        _require(width == expected, f"backbone features are {width}, the head expects {expected}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrootConfig:
        """Read a checkpoint's `config.json` (raises `ConfigError` on what is not implemented)."""
        kind = data.get("model_type")
        _require(kind == MODEL_TYPE, f"model_type is {kind!r}, expected {MODEL_TYPE!r}")
        for key in ("backbone_cfg", "action_head_cfg"):
            _require(key in data, f"{key!r} is missing")
        # Older files give the two action sizes only at the top level.
        top = {k: data[k] for k in ("action_dim", "action_horizon") if k in data}
        nested = ("model_type", "backbone_cfg", "action_head_cfg", "eagle_cfg")
        eagle = data.get("eagle_cfg")
        return cls(
            backbone=BackboneConfig.from_dict(data["backbone_cfg"]),
            action_head=ActionHeadConfig.from_dict({**top, **data["action_head_cfg"]}),
            eagle=EagleConfig() if eagle is None else EagleConfig.from_dict(eagle),
            **_known(cls, data, nested=nested),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `config.json`; `eagle_cfg` is written only where it differs from the published."""
        plain = _plain(self, skip=("backbone", "action_head", "eagle"))
        nested: dict[str, Any] = {
            "backbone_cfg": self.backbone.to_dict(),
            "action_head_cfg": self.action_head.to_dict(),
        }
        if self.eagle != EagleConfig():
            nested["eagle_cfg"] = self.eagle.to_dict()
        return {"model_type": MODEL_TYPE, **plain, **nested}
