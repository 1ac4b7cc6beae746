"""pi0.5: SigLIP + PaliGemma prefix with a K/V cache, adaRMS action expert, flow sampling.

Parameter names are those of openpi's PyTorch checkpoints (without the two unused language
heads), so a state dict loads as it is. Flow time runs from 1 (noise) to 0 (actions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from omega_qvla.errors import ConfigError, NumericsError, ObservationError, StepError
from omega_qvla.kernels import rows
from omega_qvla.modules.captured import Captured
from omega_qvla.modules.int8 import Int8Embedding
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.dtypes import full_precision
from omega_qvla.policies.pi05.gemma import MASKED, Expert, LanguageModel, Modulation, Rope
from omega_qvla.policies.siglip import SiglipVisionModel

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time sinusoid, in units of flow time
_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"


@dataclass(frozen=True)
class Prefix:
    """What the expert needs of B observations; computed once, read by every denoising step.

    keys, values: per layer [B, kv_heads, S, head_dim], K after RoPE.
    pad_mask: bool [B, S], true where a position is valid. num_valid: int64 [B].
    bias: float32 [B, 1, 1, S], 0 or a large negative number; None when all are valid.
    repeats: how many samples share each observation (rows b*repeats.. of x_t).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pad_mask: Tensor
    num_valid: Tensor
    bias: Tensor | None
    repeats: int = 1

    @property
    def samples(self) -> int:
        """Rows that x_t must have: B * repeats."""
        return len(self.num_valid) * self.repeats

    def repeat(self, count: int) -> Prefix:
        """`count` samples per observation, observation-major; the cache is not copied."""
        return dataclasses.replace(self, repeats=self.repeats * count)


@dataclass(frozen=True)
class StepConditioning:
    """All adaRMS modulations of T flow times: two per layer, then the final norm's."""

    modulations: tuple[Modulation, ...]

    def __len__(self) -> int:
        return len(self.modulations[0].scale)

    def step(self, index: int) -> StepConditioning:
        """The conditioning of one of the T times, as T = 1 (broadcast over the batch)."""
        rows = slice(index, index + 1)
        return StepConditioning(
            tuple(Modulation(*(part[rows] for part in m)) for m in self.modulations)
        )


@dataclass(frozen=True)
class BakedConditioning:
    """The modulations of one fixed time grid, in place of the layers that compute them.

    time: float32 [T], on the CPU.
    """

    time: Tensor
    conditioning: StepConditioning

    def at(self, time: Tensor) -> StepConditioning:
        """The conditioning, if `time` is its grid. Raises StepError."""
        if not torch.equal(time.cpu(), self.time):
            raise StepError(
                f"this policy was baked for {len(self.time)} denoising steps and was asked for "
                f"{len(time)} times, not those; bundle it anew with other --bake-steps, or none"
            )
        return self.conditioning


@dataclass(frozen=True)
class KeptConditioning:
    """The conditioning of each step of the usual grid, computed once: weights and grid alone
    decide it.

    time: float32 [T], on the CPU.
    """

    time: Tensor
    steps: tuple[StepConditioning, ...]


class _VisionTower(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.vision_model = SiglipVisionModel(config.vision)


class _Projector(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision.hidden_size, config.vlm.width)


class _PaliGemmaModel(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.vision_tower = _VisionTower(config)
        self.multi_modal_projector = _Projector(config)
        self.language_model = LanguageModel(config.vlm, config.vocab_size)


class _PaliGemma(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.model = _PaliGemmaModel(config)


class _GemmaExpert(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.model = Expert(config.expert)


class _PaliGemmaWithExpert(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.paligemma = _PaliGemma(config)
        self.gemma_expert = _GemmaExpert(config)


class Pi05Model(nn.Module):
    """The whole network. It builds on any device, the meta device included."""

    fast = False

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.paligemma_with_expert = _PaliGemmaWithExpert(config)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.baked: BakedConditioning | None = None
        self.kept: KeptConditioning | None = None
        self._angles: dict[int, Rope] = {}
        self.captured: Captured | None = None

    def fuse(self) -> None:
        """Repeat what was done before with inputs of the same size from now on."""
        self.captured = Captured()

    @property
    def vision(self) -> SiglipVisionModel:
        """The image encoder."""
        return self.paligemma_with_expert.paligemma.model.vision_tower.vision_model

    @property
    def language_model(self) -> LanguageModel:
        """The prefix stack."""
        return self.paligemma_with_expert.paligemma.model.language_model

    @property
    def expert(self) -> Expert:
        """The suffix stack."""
        return self.paligemma_with_expert.gemma_expert.model

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the residual streams: that of the embeddings."""
        table = self.language_model.embed_tokens
        return table.output_dtype if isinstance(table, Int8Embedding) else table.weight.dtype

    def unused_linears(self) -> tuple[str, ...]:
        """Names of the linear layers that inference never runs.

        The expert reads the last language layer's keys and values, not its output.
        """
        last = f"{_LANGUAGE}.layers.{self.config.vlm.depth - 1}"
        names = ["self_attn.q_proj", "self_attn.o_proj"]
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        return tuple(f"{last}.{name}" for name in names)

    def embed_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_mask: Tensor,
        *,
        trim: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """[images | language] as one sequence: embeddings [B, S, width], pad mask [B, S].

        Arguments as for `encode_prefix`.
        """
        self._check_prefix(images, image_masks, lang_tokens, lang_mask)
        length = lang_tokens.shape[1]
        if trim:
            used = torch.stack([mask.any() for mask in image_masks] + [lang_mask.any()]).tolist()
            images = [image for image, u in zip(images, used, strict=False) if u]
            image_masks = [mask for mask, u in zip(image_masks, used, strict=False) if u]
            columns = lang_mask.any(0).nonzero()
            length = int(columns[-1]) + 1 if len(columns) else 0
        parts, masks = [], []
        if images:
            features = self._repeated("images", self.image_features, torch.cat(list(images)))
            parts += features.to(self.compute_dtype).chunk(len(images))
            tokens = self.config.vision.num_tokens
            masks += [mask[:, None].expand(-1, tokens) for mask in image_masks]
        parts.append(self.language_model.embed(lang_tokens[:, :length]))
        masks.append(lang_mask[:, :length])
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def image_features(self, images: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] to [N, tokens, width] of the language model."""
        model = self.paligemma_with_expert.paligemma.model
        features: Tensor = model.multi_modal_projector.linear(self.vision(images))
        return features

    def _repeated(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), by `modules.captured` in a fast model."""
        if self.captured is None:
            return function(*inputs)
        return self.captured(self, function, *inputs, key=key)

    def encode_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_mask: Tensor,
        *,
        trim: bool = True,
    ) -> Prefix:
        """Encode observations.

        Args:
            images: per slot, [B, 3, image_size, image_size] in [-1, 1].
            image_masks: per slot, bool [B]; false where the camera is missing.
            lang_tokens: int64 [B, L]; lang_mask: bool [B, L].
            trim: leave out the images that are masked, and the trailing language positions
                that are padding, in the whole batch. The result is the same on all valid
                positions; masked positions never had an influence. False keeps the shapes
                independent of the data.

        Raises:
            ObservationError: shapes or dtypes do not fit the model or each other.
        """
        embeddings, pad_mask = self.embed_prefix(
            images, image_masks, lang_tokens, lang_mask, trim=trim
        )
        bias = None
        if not (trim and bool(pad_mask.all())):
            bias = torch.zeros(pad_mask.shape, device=pad_mask.device)
            bias = bias.masked_fill(~pad_mask, MASKED)[:, None, None]
        rope = self.prefix_rope(pad_mask)
        if bias is None:
            cache = self._repeated("prefix", self._keys_values, embeddings, *rope)
        else:
            cache = self._keys_values(embeddings, *rope, bias)
        depth = len(cache) // 2
        return Prefix(cache[:depth], cache[depth:], pad_mask, pad_mask.sum(1), bias)

    def _keys_values(
        self, embeddings: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Keys of every layer, then values of every layer."""
        keys, values, _ = self.language_model(embeddings, Rope(cos, sin), bias)
        return *keys, *values

    def prefix_rope(self, pad_mask: Tensor) -> Rope:
        """Rotary tables of the prefix: masked tokens do not consume positions."""
        positions = pad_mask.cumsum(1) - 1
        return self._rope(positions, self.config.vlm.head_dim, pad_mask.shape[1])

    def _rope(self, positions: Tensor, head_dim: int, limit: int) -> Rope:
        """Rotary tables of positions below `limit`. A fast model keeps those of all positions:
        torch shares even a few thousand cosines among its threads (see `modules.norm`)."""
        dtype = self.compute_dtype
        if not self.fast or torch.compiler.is_compiling():
            return Rope.at(positions, head_dim, dtype)
        kept = self._angles.get(head_dim)
        if kept is None or kept.cos.shape[1] < limit or kept.cos.dtype != dtype:
            with torch.inference_mode(False):  # what is kept may meet a gradient later
                every = torch.arange(limit, device=positions.device)[None]
                kept = self._angles[head_dim] = Rope.at(every, head_dim, dtype)
        return kept.rows(positions)

    def time_grid(self, num_steps: int) -> Tensor:
        """Flow times of the steps, float32 [num_steps], on the CPU.

        The reference adds dt = -1/n to t in float32 over and over; the last digits that this
        loses matter (1e-7 in t, times 2 pi / 0.004, is 1e-4 in the velocity), so it is
        repeated here exactly. LeRobot computes 1 - s / n in double precision and rounds once
        (`config.time_grid` is then `exact`).
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps must be positive, got {num_steps}")
        if self.config.time_grid == "exact":
            exact = [1.0 + s * (-1.0 / num_steps) for s in range(num_steps)]
            return torch.tensor(exact, dtype=torch.float32)
        dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
        times = [torch.tensor(1.0, dtype=torch.float32)]
        while len(times) < num_steps:
            times.append(times[-1] + dt)
        return torch.stack(times)

    def time_embedding(self, time: Tensor) -> Tensor:
        """Flow times [T] -> condition [T, width] of the adaRMS norms."""
        half = self.config.expert.width // 2
        # float64 as in the reference; built on the CPU for devices that lack it.
        fraction = torch.linspace(0.0, 1.0, half, dtype=torch.float64)
        period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
        phase = time.to("cpu", torch.float64)[:, None] * (2 * math.pi / period)
        sinusoid = torch.cat((phase.sin(), phase.cos()), dim=-1)
        weight = self.time_mlp_in.weight
        x = sinusoid.to(torch.float32).to(weight.device, weight.dtype)
        return silu(self.time_mlp_out(silu(self.time_mlp_in(x))))

    def conditioning(self, time: Tensor) -> StepConditioning:
        """All modulations for flow times `time` [T]: every step of a grid, or one per sample.

        Raises:
            StepError: the modulations are baked (stored, their layers left out), of other times.
        """
        if self.baked is not None:
            return self.baked.at(time)
        with full_precision(self.time_mlp_in.weight.device):
            return StepConditioning(self.expert.modulations(self.time_embedding(time)))

    def step_conditionings(self, time_grid: Tensor) -> tuple[StepConditioning, ...]:
        """`conditioning` of each time of the grid, kept where `keep_conditioning` did so."""
        if self.kept is not None and torch.equal(time_grid.cpu(), self.kept.time):
            return self.kept.steps
        cond = self.conditioning(time_grid)
        return tuple(cond.step(s) for s in range(len(time_grid)))

    def keep_conditioning(self) -> None:
        """Compute the conditioning of the usual grid once and for all. The weights that it
        depends on must not change afterwards."""
        if self.baked is None or len(self.baked.time) == self.config.num_inference_steps:
            self.kept = None
            grid = self.time_grid(self.config.num_inference_steps)
            self.kept = KeptConditioning(grid, self.step_conditionings(grid))

    def suffix_rope(self, prefix: Prefix, length: int) -> Rope:
        """Rotary tables of `length` suffix tokens per sample: they follow the valid prefix."""
        offsets = torch.arange(length, device=prefix.num_valid.device)
        positions = prefix.num_valid.repeat_interleave(prefix.repeats)[:, None] + offsets
        limit = prefix.pad_mask.shape[1] + length
        return self._rope(positions, self.config.expert.head_dim, limit)

    def velocity(
        self, prefix: Prefix, x_t: Tensor, cond: StepConditioning, rope: Rope | None = None
    ) -> Tensor:
        """One pass of the expert.

        Args:
            prefix: B observations, each shared by `prefix.repeats` samples.
            x_t: noisy actions [B * repeats, H, action_dim].
            cond: conditioning of one time (all samples) or of B * repeats times (one each).
            rope: `suffix_rope(prefix, H)`, if the caller keeps it.

        Returns:
            The velocity d x / d t, [B * repeats, H, action_dim], float32.

        Raises:
            NumericsError: the number of rows of the arguments do not fit.
        """
        if len(x_t) != prefix.samples or len(cond) not in (1, len(x_t)):
            raise NumericsError(
                f"x_t has {len(x_t)} rows and cond {len(cond)}, but the prefix is for "
                f"{prefix.samples} samples: use prefix.repeat(R), and 1 or {prefix.samples} times"
            )
        with full_precision(x_t.device):
            x: Tensor = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))
        x = x.to(self.compute_dtype)
        if rope is None:
            rope = self.suffix_rope(prefix, x.shape[1])
        x = self.expert(x, prefix.keys, prefix.values, rope, prefix.bias, cond.modulations)
        with full_precision(x_t.device):
            v_t: Tensor = self.action_out_proj(x.to(self.action_out_proj.weight.dtype))
        return v_t.float()

    def sample_actions(
        self,
        prefix: Prefix,
        noise: Tensor,
        num_steps: int | None = None,
        time_grid: Tensor | None = None,
    ) -> Tensor:
        """Integrate the flow from noise (t = 1) to actions (t = 0) by Euler steps.

        Args:
            prefix: the encoded observations.
            noise: [B * repeats, H, action_dim].
            num_steps: default `config.num_inference_steps`.
            time_grid: float32 [n], the times to use in place of `self.time_grid(n)`.

        Returns:
            Actions [B * repeats, H, action_dim], float32, still normalized.
        """
        if time_grid is None:
            time_grid = self.time_grid(num_steps or self.config.num_inference_steps)
        elif num_steps not in (None, len(time_grid)):
            raise ConfigError(f"num_steps {num_steps} and {len(time_grid)} times disagree")
        total = len(time_grid)
        dt = torch.tensor(-1.0 / total, dtype=torch.float32).item()
        steps = self.step_conditionings(time_grid)
        x_t = noise.float()
        rope = self.suffix_rope(prefix, x_t.shape[1])
        if self.kept is None or steps is not self.kept.steps or prefix.bias is not None:
            return self._integrate(prefix, x_t, rope, steps, dt)

        def integrate(x: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor) -> Tensor:
            half = len(cache) // 2
            same = dataclasses.replace(prefix, keys=cache[:half], values=cache[half:])
            return self._integrate(same, x, Rope(cos, sin), steps, dt)

        inputs = (x_t, *rope, *prefix.keys, *prefix.values)
        key = ("actions", id(steps), prefix.repeats)
        actions: Tensor = self._repeated(key, integrate, *inputs)
        return actions

    def _integrate(
        self, prefix: Prefix, x: Tensor, rope: Rope, steps: Sequence[StepConditioning], dt: float
    ) -> Tensor:
        fast = self.fast and x.is_cpu
        share = torch.full((1, 1, x.shape[-1]), dt) if fast else None
        for s, cond in enumerate(steps):
            with denoising_step(s, len(steps)):
                velocity = self.velocity(prefix, x, cond, rope)
            done = None if share is None else rows.residual(x, velocity, share)
            x = x + dt * velocity if done is None else done
        return x

    def _check_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_mask: Tensor,
    ) -> None:
        if len(images) != len(image_masks) or len(images) > len(self.config.image_slots):
            raise ObservationError(
                f"{len(images)} images with {len(image_masks)} masks for the slots "
                f"{', '.join(self.config.image_slots)}"
            )
        batch = len(lang_tokens)
        if lang_tokens.dim() != 2 or lang_tokens.shape != lang_mask.shape:
            raise ObservationError(
                f"lang_tokens {list(lang_tokens.shape)} and lang_mask {list(lang_mask.shape)} "
                "must both be [B, L]"
            )
        if lang_mask.dtype != torch.bool or any(m.dtype != torch.bool for m in image_masks):
            raise ObservationError("masks must be bool tensors")
        for slot, image, mask in zip(self.config.image_slots, images, image_masks, strict=False):
            if len(image) != batch or tuple(mask.shape) != (batch,):
                raise ObservationError(
                    f"{slot}: {len(image)} images and mask {list(mask.shape)} for a batch of "
                    f"{batch}"
                )
