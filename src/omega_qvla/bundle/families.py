"""What of each family a bundle can store smaller, and the baking of its time layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import BundleError
from omega_qvla.policies import checkpoint
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.dit import StepConditioning as GrootConditioning
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.gemma import Modulation
from omega_qvla.policies.pi05.model import BakedConditioning, Pi05Model, StepConditioning
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor

Bundled = Pi05Policy | GrootPolicy
BAKED = "baked."


@dataclass(frozen=True)
class Parts:
    """Where in the network: the embedding table, and prefixes of what may go to 8 bits."""

    embedding: str
    vision: str
    connector: tuple[str, ...]


PARTS: Mapping[str, Parts] = MappingProxyType(
    {
        "pi05": Parts(
            "paligemma_with_expert.paligemma.model.language_model.embed_tokens",
            "paligemma_with_expert.paligemma.model.vision_tower.",
            ("paligemma_with_expert.paligemma.model.multi_modal_projector.",),
        ),
        "groot_n15": Parts(
            "backbone.eagle_model.language_model.model.embed_tokens",
            "backbone.eagle_model.vision_model.",
            ("backbone.eagle_model.mlp1.", "action_head.vl_self_attention."),
        ),
    }
)
LAYOUTS: Mapping[str, checkpoint.Layout] = MappingProxyType(
    {layout.family: layout for layout in checkpoint.LAYOUTS}
)
_EMBODIMENT = ("state_encoder", "action_encoder", "action_decoder")


def embodied(name: str) -> bool:
    """Whether the tensor `name` has one set of weights per embodiment in its first axis."""
    return name.startswith(tuple(f"action_head.{part}." for part in _EMBODIMENT))


def blank_policy(
    family: str, config: Mapping[str, Any], folder: Path, *, one_embodiment: bool = False
) -> Bundled:
    """The policy of a bundle without weights (on the meta device).

    Args:
        config: the content of config.json.
        folder: where the processor's files are, as the processor itself saves them.
        one_embodiment: room for the weights of one embodiment only.

    Raises:
        BundleError: an unknown family. CheckpointError, ConfigError: as `load_policy`.
    """
    if family == "pi05":
        pi05 = Pi05Config.from_dict(config)
        return _pi05(pi05, Pi05Processor.load(folder, pi05))
    if family != "groot_n15":
        raise BundleError(f"unknown policy family {family!r}; one of {', '.join(PARTS)}")
    groot = GrootConfig.from_dict(config)
    return _groot(groot, GrootProcessor.load(folder, groot), one_embodiment)


def with_steps(policy: Bundled, steps: int) -> Bundled:
    """The same policy for another number of denoising steps, without weights."""
    if isinstance(policy, Pi05Policy):
        pi05 = dataclasses.replace(policy.model.config, num_inference_steps=steps)
        return _pi05(pi05, policy.processor)
    groot = policy.model.config
    head = dataclasses.replace(groot.action_head, num_inference_timesteps=steps)
    return _groot(dataclasses.replace(groot, action_head=head), policy.processor)


def _pi05(config: Pi05Config, processor: Pi05Processor) -> Pi05Policy:
    with torch.device("meta"):
        model = Pi05Model(config)
    return Pi05Policy(model.eval().requires_grad_(False), processor)


def _groot(
    config: GrootConfig, processor: GrootProcessor, one_embodiment: bool = False
) -> GrootPolicy:
    if one_embodiment:
        head = dataclasses.replace(config.action_head, max_num_embodiments=1)
        config = dataclasses.replace(config, action_head=head)
    with torch.device("meta"):
        model = GrootModel(config)
    return GrootPolicy(model.eval().requires_grad_(False), processor)


def time_linears(policy: Bundled) -> tuple[str, ...]:
    """The layers whose inputs depend on the denoising time alone."""
    if isinstance(policy, Pi05Policy):
        return policy.step_independent_linears()
    features = ("action_head.vl_self_attention.",)
    return tuple(
        name
        for name in policy.step_independent_linears()
        if not name.startswith(features) and not name.endswith((".attn1.to_k", ".attn1.to_v"))
    )


@torch.no_grad()
def bake(policy: Bundled, steps: int) -> dict[str, Tensor]:
    """What the time layers give in the steps of a trajectory, as tensors to store.

    Only the time layers of `policy` need weights (float32 on the CPU); it may have none at all
    on the meta device, to learn the shapes.

    pi0.5: `time` f32 [T]; `modulations` f32 [2 * layers + 1, 3, T, width] (scale, shift, gate).
    GR00T: the fields of `StepConditioning` that are there for all steps at once.
    """
    if isinstance(policy, Pi05Policy):
        time = policy.model.time_grid(steps)
        modulations = policy.model.conditioning(time).modulations
        stacked = torch.stack([torch.stack([part[:, 0] for part in m]) for m in modulations])
        return {f"{BAKED}time": time, f"{BAKED}modulations": stacked}
    head = policy.model.action_head
    device = head.model.proj_out_1.weight.device
    conditioning = head.conditioning(head.buckets(steps).to(device))
    made = {f.name: getattr(conditioning, f.name) for f in dataclasses.fields(conditioning)}
    return {f"{BAKED}{name}": tensor for name, tensor in made.items() if tensor is not None}


def install_baked(policy: Bundled, stored: Mapping[str, Tensor], device: torch.device) -> None:
    """Put what `bake` made in place of the time layers. Raises BundleError: tensors missing."""
    tensors = {name.removeprefix(BAKED): tensor.clone() for name, tensor in stored.items()}
    try:
        if isinstance(policy, Pi05Policy):
            made = tensors["modulations"].to(device)
            modulations = tuple(Modulation(*(part[:, None] for part in m)) for m in made)
            policy.model.baked = BakedConditioning(tensors["time"], StepConditioning(modulations))
            return
        head = policy.model.action_head
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        moved["tau"] = moved["tau"].to(head.dtype)  # enters a product with the encoder's weights
        head.baked = GrootConditioning(**moved)
    except (KeyError, TypeError) as error:
        raise BundleError(f"the baked tensors are not this family's: {error}") from error
