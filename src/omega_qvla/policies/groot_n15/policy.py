"""GR00T N1.5 as a `Policy`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omega_qvla.policies.base import (
    START,
    Heads,
    PolicyBase,
    Producer,
    Side,
    Site,
    Stage,
    check_side,
)
from omega_qvla.policies.groot_n15.action_head import Prefix
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.processor import GrootInputs, GrootProcessor
from omega_qvla.policies.observation import Observation

_LANGUAGE = "backbone.eagle_model.language_model.model"
_DIT = "action_head.model"

#: Include regexes and exclude regex of the published recipe (Omega-QVLA README, sections 3-5).
_INCLUDE: dict[Side, str] = {
    "backbone": r".*backbone\.eagle_model\.language_model\..*\."
    r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    "action_head": r".*action_head\.model\.transformer_blocks\.\d+\."
    r"(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)).*",
}
_EXCLUDE = (
    r"(?:^|\.)(vision|radio|norm|ln|layernorm|embed|lm_head|timestep_encoder|state_encoder"
    r"|action_encoder|action_decoder|pos_embed|vl_self_attention|vlln|future_tokens)(?:\.|$)"
)


class GrootPolicy(PolicyBase):
    """Eagle backbone, interleaved DiT action head; flow time from 0 to 1."""

    family = "groot_n15"

    def __init__(self, model: GrootModel, processor: GrootProcessor) -> None:
        self.model, self.processor = model, processor

    @property
    def module(self) -> GrootModel:
        return self.model

    @property
    def num_steps(self) -> int:
        return self.model.config.action_head.num_inference_timesteps

    @property
    def action_dim(self) -> int:
        return self.processor.action_dim

    @property
    def model_action_dim(self) -> int:
        return self.model.config.action_head.action_dim

    @property
    def action_horizon(self) -> int:
        return self.model.config.action_head.action_horizon

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.processor.cameras

    def prepare(self, observations: Sequence[Observation]) -> GrootInputs:
        return self.processor.prepare(observations).to(self.device)

    @torch.no_grad()
    def encode(self, inputs: GrootInputs) -> Prefix:
        """Padding of a batch is kept out of the action head, so a batch gives each observation
        the actions that it gets alone (the original lets it leak; alone, nothing is padded)."""
        return self.model.encode(
            inputs.pixel_values,
            inputs.input_ids,
            inputs.attention_mask,
            inputs.state,
            inputs.embodiment_id,
            mask_padding=True,
        )

    @torch.no_grad()
    def sample(self, prefix: Prefix, noise: Tensor, num_steps: int | None = None) -> Tensor:
        return self.model.sample_actions(prefix, noise, num_steps)

    def finish(self, actions: Tensor, inputs: GrootInputs) -> np.ndarray:
        return self.processor.unnormalize_actions(actions.float().cpu().numpy())

    def targets(self, side: Side) -> tuple[str, str]:
        return _INCLUDE[check_side(side)], _EXCLUDE

    def side_of(self, name: str) -> Side:
        return "backbone" if name.startswith("backbone.") else "action_head"

    def unused_linears(self) -> tuple[str, ...]:
        return self.model.unused_linears()

    def step_independent_linears(self) -> tuple[str, ...]:
        return self.model.step_independent_linears()

    @torch.no_grad()
    def keep_conditioning(self) -> None:
        self.model.action_head.keep_conditioning()

    def sites(self) -> tuple[Site, ...]:
        return (*self._language_sites(), *self._dit_sites())

    def stages(self) -> tuple[Stage, ...]:
        """The head's own encoding of the features belongs to the last stage: its key and value
        layers are parts of the blocks that the denoising steps run."""
        eagle, config = "backbone.eagle_model", self.model.config
        layers = [f"{_LANGUAGE}.layers.{i}" for i in range(config.backbone.select_layer)]
        after = (f"{_LANGUAGE}.norm", "backbone.eagle_linear", "action_head")
        count = len(self.model.action_head.model.transformer_blocks)
        return (
            Stage(START, (f"{eagle}.vision_model", f"{eagle}.mlp1", f"{_LANGUAGE}.embed_tokens")),
            *(Stage(layer, (layer,)) for layer in layers),
            Stage(
                f"{_LANGUAGE}.norm",
                after,
                tuple(f"{_DIT}.transformer_blocks.{i}" for i in range(count)),
            ),
        )

    def _language_sites(self) -> list[Site]:
        text = self.model.config.eagle.text
        heads = Heads(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        sites = []
        for i in range(self.model.config.backbone.select_layer):
            layer = f"{_LANGUAGE}.layers.{i}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            before = Producer("norm", f"{layer}.input_layernorm")
            after = Producer("norm", f"{layer}.post_attention_layernorm")
            sites += [
                Site(tuple(f"{attention}.{n}_proj" for n in "qkv"), before),
                Site((f"{attention}.o_proj",), Producer("rows", f"{attention}.v_proj", heads)),
                Site((f"{mlp}.gate_proj", f"{mlp}.up_proj"), after),
                Site((f"{mlp}.down_proj",), Producer("rows", f"{mlp}.up_proj")),
            ]
        return sites

    def _dit_sites(self) -> list[Site]:
        sites: list[Site] = []
        dit = self.model.config.action_head.diffusion
        heads = Heads(dit.num_attention_heads, dit.num_attention_heads, dit.attention_head_dim)
        shared: list[str] = []  # every cross block's keys and values read the same features
        for i, block in enumerate(self.model.action_head.model.transformer_blocks):
            here = f"{_DIT}.transformer_blocks.{i}"
            query, key_value = f"{here}.attn1.to_q", [f"{here}.attn1.to_k", f"{here}.attn1.to_v"]
            cross = bool(getattr(block, "cross", False))
            if cross:
                shared += key_value
            readers = (query,) if cross else (query, *key_value)
            sites += [
                Site(readers, Producer("adaptive", f"{here}.norm1.linear")),
                Site((f"{here}.attn1.to_out.0",), Producer("rows", f"{here}.attn1.to_v", heads)),
                Site((f"{here}.ff.net.0.proj",), None),
                Site((f"{here}.ff.net.2",), None),
            ]
        return [*sites, Site(tuple(shared), None)]
