"""The SigLIP vision tower, shared by both policy families.

Parameter names (relative to this module) and the computation are those of the So400m/14
tower in the published checkpoints: convolutional patches without padding, learned positions,
pre-LayerNorm blocks with biases everywhere, tanh-GELU, a final LayerNorm, no pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from omega_qvla.errors import ConfigError, ObservationError
from omega_qvla.kernels import rows
from omega_qvla.kernels.block import BlockShape
from omega_qvla.kernels.dense import PackedDense
from omega_qvla.modules.block import WholeBlock, norm_rows
from omega_qvla.policies.attention import attend_heads


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a SigLIP tower; the image is square, of `image_size` pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not 0 < self.patch_size <= self.image_size:
            raise ConfigError(
                f"vision: patch_size {self.patch_size} does not fit image_size {self.image_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Patches (= output tokens) of one image."""
        return (self.image_size // self.patch_size) ** 2


SIGLIP_SO400M = SiglipConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)


class SiglipEmbeddings(nn.Module):
    """Patches to tokens: [B, 3, H, W] -> [B, tokens, hidden], row-major."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.num_tokens, config.hidden_size)
        self.packed: PackedDense | None = None

    def fuse(self) -> None:
        """Multiply with a copy of the weights from now on, where they are small."""
        weight = self.patch_embedding.weight.flatten(1)
        self.packed = PackedDense.of(weight, self.patch_embedding.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # Patches do not overlap, so the convolution is one matrix product: several times
        # faster than conv2d on CPUs at these sizes, and the same sum.
        size, side = self.patch_size, pixel_values.shape[-1] // self.patch_size
        weight = self.patch_embedding.weight
        pixels = pixel_values[..., : side * size, : side * size].to(weight.dtype)
        grid = pixels.reshape(len(pixels), 3, side, size, side, size)
        positions = self.position_embedding.weight
        if self.packed is not None:
            tokens = self._small(self.packed, grid)
            placed = None if tokens is None else self._placed(tokens, positions)
            if placed is not None:
                return placed
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), side * side, -1)
        return linear(patches, weight.flatten(1), self.patch_embedding.bias) + positions

    @staticmethod
    def _small(packed: PackedDense, grid: Tensor) -> list[Tensor] | None:
        """One image at a time: torch would share a larger copy among threads, which then stay
        awake for milliseconds and keep the kernels' own waiting."""
        tokens = [packed(image.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)) for image in grid]
        known = [one for one in tokens if one is not None]
        return known if len(known) == len(tokens) else None

    @staticmethod
    def _placed(tokens: list[Tensor], positions: Tensor) -> Tensor | None:
        """Tokens of every image with their positions added: [B, tokens, hidden]."""
        placed = [rows.residual(one[None], positions.detach()[None]) for one in tokens]
        known = [one for one in placed if one is not None]
        done = rows.joined(*known) if len(known) == len(tokens) else None
        return None if done is None else done.view(len(tokens), -1, done.shape[-1])


class SiglipAttention(nn.Module):
    """Bidirectional multi-head attention over the patches of one image."""

    fast = False

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (
            proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attend_heads(q, k, v, fast=self.fast))
        return out


class SiglipMlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    fast = False

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        active = rows.gated("gelu", inner) if self.fast else None
        out: Tensor = self.fc2(gelu(inner, approximate="tanh") if active is None else active)
        return out


class SiglipLayer(nn.Module):
    """One pre-LayerNorm block."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMlp(config)
        self.whole: WholeBlock | None = None

    def fuse(self) -> None:
        """Run as one call from now on, where the layers that it has now allow it."""
        attention, mlp, norm = self.self_attn, self.mlp, self.layer_norm1
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.out_proj,),
            (mlp.fc1,),
            (mlp.fc2,),
        )
        heads = attention.num_heads
        dim = attention.out_proj.in_features // heads
        shape = BlockShape(heads, heads, dim, norm.eps, "layer", "gelu", plain=True)
        self.whole = WholeBlock.of(groups, shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole is not None:
            done = self.whole(x, norm_rows(self.layer_norm1), norm_rows(self.layer_norm2))
            if done is not None:
                return done
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class SiglipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionModel(nn.Module):
    """Images to features, all patches kept."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, image_size, image_size], float, scaled to [-1, 1].

        Returns:
            [B, tokens, hidden_size] in the dtype of the blocks (patches and positions may be
            kept in a wider one).

        Raises:
            ObservationError: if the images have another shape.
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ObservationError(
                f"images must have shape [B, 3, {size}, {size}], got "
                f"{list(pixel_values.shape)}: resize them to the model's image_size"
            )
        tokens = self.embeddings(pixel_values).to(self.post_layernorm.weight.dtype)
        features: Tensor = self.post_layernorm(self.encoder(tokens))
        return features
