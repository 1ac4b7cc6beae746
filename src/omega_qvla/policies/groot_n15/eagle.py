"""The Eagle 2.5 vision-language backbone: SigLIP, connector, truncated Qwen3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.errors import ConfigError, ObservationError
from omega_qvla.modules.shared import watched
from omega_qvla.policies.groot_n15.config import BackboneConfig, EagleConfig, Qwen3Config
from omega_qvla.policies.groot_n15.qwen3 import Lead, Qwen3Model
from omega_qvla.policies.siglip import SiglipConfig, SiglipVisionModel


class VisionTower(nn.Module):
    """Holds SigLIP one level down, as the checkpoint's names have it."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.vision_model = SiglipVisionModel(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.vision_model(pixel_values)
        return out


class LanguageModel(nn.Module):
    """Holds Qwen3 one level down, as the checkpoint's names have it."""

    def __init__(self, config: Qwen3Config, num_layers: int) -> None:
        super().__init__()
        self.model = Qwen3Model(config, num_layers)

    def forward(self, embeddings: Tensor, valid: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(embeddings, valid)
        return out


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Join each factor x factor block of patches into one token.

    Args:
        x: [N, side * side, C], row-major patches.
        factor: patches per side of a block.

    Returns:
        [N, (side / factor)^2, factor^2 * C]; channels ordered (row, column, C) in the block.
    """
    batch, tokens, channels = x.shape
    side = round(tokens**0.5) // factor
    blocks = x.view(batch, side, factor, side, factor, channels).transpose(2, 3)
    return blocks.reshape(batch, side * side, factor * factor * channels)


def connector(config: EagleConfig) -> nn.Sequential:
    """`mlp1`: one Linear, or LayerNorm, Linear, GELU, Linear."""
    source, target = config.connector_dim, config.text.hidden_size
    if config.mlp_connector_layers == 1:
        return nn.Sequential(nn.Linear(source, target))
    return nn.Sequential(
        nn.LayerNorm(source), nn.Linear(source, target), nn.GELU(), nn.Linear(target, target)
    )


#: Beginnings of prompts, up to the first image, that are kept: one system prompt has one.
KEPT_LEADS = 4


class EagleModel(nn.Module):
    """Images and token ids to language-model features."""

    fast = False

    def __init__(self, config: EagleConfig, num_language_layers: int) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.mlp1 = connector(config)
        self.language_model = LanguageModel(config.text, num_language_layers)
        self._leads: dict[tuple[int, ...], Lead] = {}

    def fuse(self) -> None:
        """Layers are others now: what was kept of a prompt is not theirs."""
        self._leads.clear()

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """[tiles, 3, H, W] to [tiles, tokens_per_image, D]."""
        weight = self.vision_model.vision_model.embeddings.patch_embedding.weight
        hidden = self.vision_model(pixel_values.to(weight.dtype))
        if self.config.use_pixel_shuffle:
            hidden = pixel_shuffle(hidden, self.config.shuffle_factor)
        out: Tensor = self.mlp1(hidden)
        return out

    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Token embeddings [B, L, D] with the image tokens written over their placeholders.

        Raises:
            ObservationError: the prompt's placeholders are not as many as the image tokens.
        """
        images = self.image_tokens(pixel_values)
        places = input_ids == self.config.image_token_index
        if not torch.compiler.is_compiling():
            _check_places(places, images)
        text: Tensor = self.language_model.model.embed_tokens(input_ids)
        # The row of each token among those of the text and, behind them, of the images.
        count, here = places.numel(), places.flatten()
        image = count + here.cumsum(0) - 1
        row = torch.where(here, image, torch.arange(count, device=here.device))
        every = torch.cat([text.flatten(0, 1), images.to(text.dtype).flatten(0, 1)])
        return every.index_select(0, row).view_as(text)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        embeddings = self.embed(pixel_values, input_ids)
        if attention_mask is None and self.fast:
            followed = self._follow(embeddings, input_ids)
            if followed is not None:
                return followed
        out: Tensor = self.language_model(embeddings, attention_mask)
        return out

    def _follow(self, embeddings: Tensor, input_ids: Tensor) -> Tensor | None:
        """The language model from the first image on: what comes before is the same in every
        prompt, and was kept. None where it must run from the start: more than one prompt, a
        gradient, somebody who watches a layer."""
        model = self.language_model.model
        if len(input_ids) > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if any(layer.whole is None for layer in model.layers) or any(map(watched, model.modules())):
            return None
        ids = input_ids[0].tolist()
        image = self.config.image_token_index
        first = tuple(ids[: ids.index(image)]) if image in ids else ()
        if not first:
            return None
        lead = self._leads.get(first)
        if lead is None:
            lead = model.lead(embeddings[:, : len(first)])
            if len(self._leads) >= KEPT_LEADS:
                self._leads.clear()
            self._leads[first] = lead
        return model.follow(lead, embeddings[:, len(first) :])


def _check_places(places: Tensor, images: Tensor) -> None:
    if places.is_meta:
        return
    count, tokens = int(places.sum()), images.shape[0] * images.shape[1]
    if count != tokens:
        raise ObservationError(
            f"the prompt has {count} image placeholders but {images.shape[0]} image tiles give "
            f"{tokens} tokens; use {images.shape[1]} placeholders per tile"
        )


class EagleBackbone(nn.Module):
    """The checkpoint's `backbone.`: Eagle, and a projection where the config asks for one."""

    def __init__(self, eagle: EagleConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        layers = backbone.select_layer
        if not 1 <= layers <= eagle.text.num_hidden_layers:
            raise ConfigError(
                f"backbone_cfg.select_layer is {layers}; the language model has layers "
                f"1..{eagle.text.num_hidden_layers}"
            )
        self.eagle_model = EagleModel(eagle, layers)
        width, projected = eagle.text.hidden_size, backbone.project_to_dim
        self.eagle_linear = nn.Identity() if projected is None else nn.Linear(width, projected)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Features [B, L, D] for the action head.

        Args:
            pixel_values: [tiles, 3, H, W], normalized; the tiles of the whole batch in order.
            input_ids: int64 [B, L] with `image_token_index` where image tokens go.
            attention_mask: [B, L], nonzero where a token is real; None: all are.
        """
        out: Tensor = self.eagle_linear(self.eagle_model(pixel_values, input_ids, attention_mask))
        return out
