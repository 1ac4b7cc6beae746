"""pi0.5 as a `Policy`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omega_qvla.policies.base import (
    SAMPLING,
    START,
    Heads,
    PolicyBase,
    Producer,
    Side,
    Site,
    Stage,
    check_side,
)
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import GemmaConfig
from omega_qvla.policies.pi05.model import Pi05Model, Prefix
from omega_qvla.policies.pi05.processor import Pi05Inputs, Pi05Processor

_BACKBONE = "paligemma_with_expert.paligemma"
_LANGUAGE = f"{_BACKBONE}.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_SEVEN = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

#: Include regexes and exclude regex of the published recipe (Omega-QVLA README, sections 3-5).
_INCLUDE: dict[Side, str] = {
    "backbone": rf".*{re.escape(_LANGUAGE)}\.layers\.[0-9]+\..*\.{_SEVEN}.*",
    "action_head": rf".*{re.escape(_EXPERT)}\.layers\.[0-9]+\..*\.{_SEVEN}.*",
}
_EXCLUDE = (
    r"(?:^|\.)(vision_tower|vision_model|embeddings|embed_tokens|norm|layernorm|lm_head)(?:\.|$)"
)


class Pi05Policy(PolicyBase):
    """SigLIP and PaliGemma prefix, adaRMS action expert; flow time from 1 to 0."""

    family = "pi05"

    def __init__(self, model: Pi05Model, processor: Pi05Processor) -> None:
        self.model, self.processor = model, processor

    @property
    def module(self) -> Pi05Model:
        return self.model

    @property
    def num_steps(self) -> int:
        return self.model.config.num_inference_steps

    @property
    def action_dim(self) -> int:
        return self.processor.config.action_dim

    @property
    def model_action_dim(self) -> int:
        return self.model.config.action_dim

    @property
    def action_horizon(self) -> int:
        return self.model.config.action_horizon

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.processor.cameras

    def prepare(self, observations: Sequence[Observation]) -> Pi05Inputs:
        return self.processor.prepare(observations).to(self.device)

    @torch.no_grad()
    def encode(self, inputs: Pi05Inputs) -> Prefix:
        return self.model.encode_prefix(
            inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask
        )

    @torch.no_grad()
    def sample(self, prefix: Prefix, noise: Tensor, num_steps: int | None = None) -> Tensor:
        return self.model.sample_actions(prefix, noise, num_steps)

    def finish(self, actions: Tensor, inputs: Pi05Inputs) -> np.ndarray:
        return self.processor.unnormalize_actions(actions.float().cpu().numpy())

    def targets(self, side: Side) -> tuple[str, str]:
        return _INCLUDE[check_side(side)], _EXCLUDE

    def side_of(self, name: str) -> Side:
        return "backbone" if name.startswith(f"{_BACKBONE}.") else "action_head"

    def unused_linears(self) -> tuple[str, ...]:
        return self.model.unused_linears()

    def step_independent_linears(self) -> tuple[str, ...]:
        """Everything that turns flow time into modulations."""
        norms = [
            f"{_EXPERT}.layers.{i}.{norm}.dense"
            for i in range(self.model.config.expert.depth)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return (*norms, f"{_EXPERT}.norm.dense", "time_mlp_in", "time_mlp_out")

    @torch.no_grad()
    def keep_conditioning(self) -> None:
        self.model.keep_conditioning()

    def sites(self) -> tuple[Site, ...]:
        config = self.model.config
        backbone = _gemma_sites(_LANGUAGE, config.vlm, adaptive=False, other=_EXPERT)
        return backbone + _gemma_sites(_EXPERT, config.expert, adaptive=True, other=None)

    def stages(self) -> tuple[Stage, ...]:
        config, model = self.model.config, f"{_BACKBONE}.model"
        before = (f"{model}.vision_tower", f"{model}.multi_modal_projector")
        layers = [f"{_LANGUAGE}.layers.{i}" for i in range(config.vlm.depth)]
        head = (_EXPERT, "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
        blocks = tuple(f"{_EXPERT}.layers.{i}" for i in range(config.expert.depth))
        return (
            Stage(START, (*before, f"{_LANGUAGE}.embed_tokens")),
            *(Stage(layer, (layer,)) for layer in layers),
            Stage(SAMPLING, head, blocks),
        )


def _gemma_sites(
    stack: str, config: GemmaConfig, *, adaptive: bool, other: str | None
) -> tuple[Site, ...]:
    sites = []
    for i in range(config.depth):
        layer = f"{stack}.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        before = _norm_producer(f"{layer}.input_layernorm", adaptive)
        after = _norm_producer(f"{layer}.post_attention_layernorm", adaptive)
        sites += [
            Site(tuple(f"{attention}.{n}_proj" for n in "qkv"), before),
            _output_site(attention, config, f"{other}.layers.{i}.self_attn" if other else None),
            Site((f"{mlp}.gate_proj", f"{mlp}.up_proj"), after),
            Site((f"{mlp}.down_proj",), Producer("rows", f"{mlp}.up_proj")),
        ]
    return tuple(sites)


def _output_site(attention: str, config: GemmaConfig, other: str | None) -> Site:
    """The input of o_proj. The expert attends to the language model's values and its own, so
    one scaling covers both values and both o_proj; it is listed with the language model's."""
    output = (f"{attention}.o_proj",)
    if other is None:
        return Site(output, None)
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    value = Producer("rows", f"{attention}.v_proj", heads, also=(f"{other}.v_proj",))
    return Site(output, value, coupled=(f"{other}.o_proj",))


def _norm_producer(name: str, adaptive: bool) -> Producer:
    return Producer("adaptive", f"{name}.dense") if adaptive else Producer("norm1", name)
