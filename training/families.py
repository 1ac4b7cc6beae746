"""The two families as training sees them: how a batch becomes a flow-matching loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs import groot_config, pi05_config
from data import Demonstrations, augment
from omega_qvla.policies.groot_n15.init import init_weights as initialize_groot
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.pi05.init import init_weights as initialize_pi05
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.statistics import Stats, compute_statistics
from omega_qvla.policies.tokenizer import (
    GROOT_IMAGE,
    build_groot_tokenizer,
    build_pi05_tokenizer,
    special_id,
)

Policy = Pi05Policy | GrootPolicy


@dataclass(frozen=True)
class Batch:
    """images float32 [2, B, 3, H, W] in [-1, 1]; tokens int64, mask bool [B, L];
    state float32 [B, S]; actions float32 [B, horizon, A]; objects float32 [B, 3]."""

    images: Tensor
    tokens: Tensor
    mask: Tensor
    state: Tensor
    actions: Tensor
    objects: Tensor


class Trainable(nn.Module):
    """The policy's network and a throw-away head.

    The head predicts where the task's object is from what the action head attends to: a
    direct reason for the vision tower to look, which flow matching alone is slow to give.
    """

    def __init__(self, model: nn.Module, features: int, seed: int) -> None:
        super().__init__()
        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.locate = nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, 3))


@dataclass(frozen=True)
class Family:
    """A policy under construction. `losses(batch, samples, generator)` -> (flow, auxiliary)."""

    policy: Policy
    trainable: Trainable
    tokenize: Callable[[list[str], np.ndarray], tuple[Tensor, Tensor]]
    losses: Callable[[Batch, int, torch.Generator], tuple[Tensor, Tensor]]
    objects: tuple[np.ndarray, np.ndarray]
    auxiliary_weight: float = 0.2


@dataclass(frozen=True)
class FamilySpec:
    """What differs between the families before a model exists."""

    horizon: int
    build: Callable[[Demonstrations, int], tuple[Policy, int]]
    flow: Callable[[Any, Trainable, Batch, int, Tensor, Tensor], tuple[Tensor, Tensor]]


def _statistics(demos: Demonstrations) -> tuple[Stats, Stats]:
    return compute_statistics(demos.state), compute_statistics(demos.chunks)


def _build_pi05(demos: Demonstrations, seed: int) -> tuple[Policy, int]:
    tokenizer = build_pi05_tokenizer(demos.prompts)
    words = max(len(tokenizer.encode(prompt).ids) for prompt in demos.prompts)
    # <bos> Task : ... , State : one bin per entry ; newline Action :
    config = pi05_config(tokenizer.get_vocab_size(), words + 10 + demos.state.shape[1])
    model = Pi05Model(config)
    initialize_pi05(model, seed)
    processor = Pi05Processor.create(config, tokenizer, *_statistics(demos))
    return Pi05Policy(model, processor), config.vlm.head_dim * config.vlm.num_kv_heads


def _build_groot(demos: Demonstrations, seed: int) -> tuple[Policy, int]:
    tokenizer = build_groot_tokenizer(demos.prompts)
    config = groot_config(tokenizer.get_vocab_size(), special_id(tokenizer, GROOT_IMAGE))
    model = GrootModel(config)
    initialize_groot(model, seed)
    processor = GrootProcessor.create(config, tokenizer, *_statistics(demos))
    return GrootPolicy(model, processor), config.action_head.backbone_embedding_dim


def _flow_pi05(
    policy: Pi05Policy, net: Trainable, batch: Batch, samples: int, time: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """openpi's flow: x_t = t noise + (1 - t) a, velocity noise - a; t = 0.999 Beta(1.5, 1) + 0.001.

    `time` [B * samples] is the Beta draw.
    """
    model = policy.model
    present = torch.ones(len(batch.state), dtype=torch.bool)
    prefix = model.encode_prefix(
        [batch.images[0], batch.images[1]],
        [present, present],
        batch.tokens,
        batch.mask,
        trim=False,
    )
    actions = batch.actions.repeat_interleave(samples, dim=0)
    t = 0.999 * time + 0.001
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    velocity = model.velocity(prefix.repeat(samples), x_t, model.conditioning(t))
    seen = prefix.values[-1].transpose(1, 2).flatten(2).mean(1)
    return velocity - (noise - actions), net.locate(seen.float())


def _flow_groot(
    policy: GrootPolicy, net: Trainable, batch: Batch, samples: int, time: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Isaac-GR00T's flow: x_t = (1 - t) noise + t a, velocity a - noise.

    `time` [B * samples] is the Beta draw; t = (0.999 - draw) / 0.999, in one of 1000 buckets.
    """
    model = policy.model
    prefix = model.encode(
        batch.images.transpose(0, 1).flatten(0, 1),
        batch.tokens,
        batch.mask,
        batch.state,
        torch.zeros(1, dtype=torch.int64),
        mask_padding=True,
    )
    actions = batch.actions.repeat_interleave(samples, dim=0)
    t = ((0.999 - time) / 0.999).clamp(0, 1)
    x_t = (1 - t[:, None, None]) * noise + t[:, None, None] * actions
    conditioning = model.conditioning((t * 1000).long().clamp(max=999))
    velocity = model.velocity(prefix.repeat(samples), x_t, conditioning)
    weight = batch.mask[..., None].float()
    seen = (prefix.vl.float() * weight).sum(1) / weight.sum(1)
    return velocity - (actions - noise), net.locate(seen)


FAMILIES = {
    "pi05": FamilySpec(10, _build_pi05, _flow_pi05),
    "groot_n15": FamilySpec(16, _build_groot, _flow_groot),
}


def make_family(name: str, demos: Demonstrations, seed: int, compiled: bool = True) -> Family:
    """Build tokenizer, statistics and a freshly initialised network."""
    spec = FAMILIES[name]
    policy, features = spec.build(demos, seed)
    net = Trainable(policy.module, features, seed)
    residuals = torch.compile(spec.flow, dynamic=False) if compiled else spec.flow

    def losses(batch: Batch, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = len(batch.state) * samples
        # Beta(1.5, 1) by its inverse distribution function.
        time = torch.rand(count, generator=generator) ** (1 / 1.5)
        noise = torch.randn(count, *batch.actions.shape[1:], generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            error, objects = residuals(policy, net, batch, samples, time, noise)
        return error.float().square().mean(), (objects.float() - batch.objects).square().mean()

    def tokenize(prompts: list[str], states: np.ndarray) -> tuple[Tensor, Tensor]:
        # All prompts of the data set in every call: one length, so one compiled graph.
        extra = list(demos.prompts)
        padding = np.repeat(states[:1], len(extra), axis=0)
        tokens, mask = policy.processor.tokenize(prompts + extra, np.concatenate([states, padding]))
        return tokens[: len(prompts)], mask[: len(prompts)]

    objects = (demos.objects.mean(0), demos.objects.std(0))
    return Family(policy, net, tokenize, losses, objects)


def make_batch(
    demos: Demonstrations,
    rows: Tensor,
    family: Family,
    generator: torch.Generator | None,
    shift: int = 4,
) -> Batch:
    """Rows of the data as a batch; with a generator, augmented."""
    index = rows.numpy()
    cameras = [demos.images_base[index], demos.images_wrist[index]]
    images = [torch.from_numpy(camera).float().div_(255) for camera in cameras]
    state = demos.state[index].astype(np.float64)
    if generator is not None:
        images = [augment(image, generator, shift) for image in images]
        jitter = torch.randn(state.shape, generator=generator).numpy()
        state = state + 0.01 * demos.state.std(0) * jitter
    processor = family.policy.processor
    tokens, mask = family.tokenize([demos.prompts[t] for t in demos.task[index]], state)
    mean, deviation = family.objects
    return Batch(
        images=torch.stack(images) * 2 - 1,
        tokens=tokens,
        mask=mask,
        state=torch.from_numpy(processor.normalize_state(state)).float(),
        actions=torch.from_numpy(processor.normalize_actions(demos.chunks[index])),
        objects=torch.from_numpy((demos.objects[index] - mean) / deviation).float(),
    )
