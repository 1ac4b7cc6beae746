"""What the rest of the program knows about a policy, and what all families share.

A policy turns observations into action chunks in four stages, so that a build, an
evaluation and a server run the same code: `prepare` (checks and preprocessing), `encode`
(the backbone, once per observation), `sample` (the denoising loop), `finish` (raw units).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.errors import ActionError, RecipeError
from omega_qvla.policies.observation import Observation

Side = Literal["backbone", "action_head"]
SIDES: tuple[Side, ...] = ("backbone", "action_head")

#: Layers that collapse at 4 bits: interfaces to states, actions and time, norms, embeddings.
PROTECTED = (
    r"(?:^|\.)(state_proj|action_in_proj|action_out_proj|(action_)?time_mlp\w*|state_encoder"
    r"|action_encoder|action_decoder|timestep_encoder|proj_out\w*|embed\w*|\w+_embedding"
    r"|future_tokens|lm_head|norm\w*|\w*layernorm|[qk]_norm|vlln)(?:\.|$)"
)


@dataclass(frozen=True)
class Heads:
    """How value heads are shared: input channel (q, c) of o_proj is row (q // group, c) of v."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Producer:
    """The module whose output channels feed a site, and how its weights scale them.

    kind:
        `norm`     RMSNorm applied as x * weight
        `norm1`    RMSNorm applied as x * (1 + weight)
        `rows`     a linear layer; its output rows (and bias) are the channels
        `adaptive` a linear layer whose first two output chunks are (scale, shift) of a norm
                   applied as x * (1 + scale) + shift
    name: qualified name in `policy.module`. heads: of `rows` that reach the site through
    attention with shared value heads. also: layers whose rows are the same channels (attention
    over two streams mixes the values of both) and must be scaled alike.
    """

    kind: Literal["norm", "norm1", "rows", "adaptive"]
    name: str
    heads: Heads | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """Linear layers that read the same input, and what produces it.

    producer is None where no exact per-channel scaling can be folded (a residual stream, the
    output of a GELU, a norm without weights), or only together with another site.
    coupled: layers with another input that comes from the same producer; their columns are
    scaled with the consumers'.
    """

    consumers: tuple[str, ...]
    producer: Producer | None
    coupled: tuple[str, ...] = ()


#: `Stage.entry` of the first stage of an inference, and of one that begins with the sampling.
START, SAMPLING = "start", "sampling"


@dataclass(frozen=True)
class Stage:
    """A part of the network that an inference runs at a stretch, and only then.

    Stages follow one another; together they are the whole inference. `entry` is the module
    whose call begins the stage, or START, or SAMPLING (between `encode` and `sample`). `parts`
    are the modules that run in it. `blocks` are those among them that the denoising steps call
    over and over, each with all that it needs as arguments, so that it can be run again alone.
    """

    entry: str
    parts: tuple[str, ...]
    blocks: tuple[str, ...] = ()


class Policy(Protocol):
    """The contract of a policy. `Inputs` and `Prefix` are the family's own types.

    Shapes: B observations, H = action_horizon, A = width of the model's action vector.
    """

    @property
    def family(self) -> str:
        """`pi05` or `groot_n15`."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network; its parameter names are the checkpoint's."""
        ...

    @property
    def num_steps(self) -> int:
        """Denoising steps of a trajectory."""
        ...

    @property
    def action_dim(self) -> int:
        """Length of the robot's action."""
        ...

    @property
    def action_horizon(self) -> int:
        """Actions in a chunk."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names that `Observation.images` must have."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def prepare(self, observations: Sequence[Observation]) -> Any:
        """Check and preprocess. Raises ObservationError naming what does not fit."""
        ...

    def encode(self, inputs: Any) -> Any:
        """Run the backbone, once per observation; the result serves every denoising step."""
        ...

    def sample(self, prefix: Any, noise: Tensor, num_steps: int | None = None) -> Tensor:
        """Denoise [B, H, A] to normalized actions [B, H, A], each step in `denoising_step`."""
        ...

    def finish(self, actions: Tensor, inputs: Any) -> np.ndarray:
        """Normalized [B, H, A] to raw units: float32 [B, H, action_dim]."""
        ...

    def draw_noise(self, batch: int, seed: int) -> Tensor:
        """Standard normal [batch, H, A]; the seed alone decides it, on every device."""
        ...

    def infer(
        self,
        observation: Observation,
        *,
        seed: int = 0,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """One chunk, float32 [H, action_dim] in raw units. Raises ActionError if not finite."""
        ...

    def targets(self, side: Side) -> tuple[str, str]:
        """Default (include, exclude) regexes of the quantized layers of a side."""
        ...

    def side_of(self, name: str) -> Side:
        """The side that the module called `name` belongs to."""
        ...

    def unused_linears(self) -> tuple[str, ...]:
        """Linear layers that inference never runs."""
        ...

    def step_independent_linears(self) -> tuple[str, ...]:
        """Linear layers of the action head that run outside `denoising_step`."""
        ...

    def sites(self) -> tuple[Site, ...]:
        """Where quantized layers share an input, and what produces it."""
        ...

    def keep_conditioning(self) -> None:
        """Compute what the denoising steps need of the weights alone once and for all."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the network in the order in which an inference runs them."""
        ...


class PolicyBase(ABC):
    """The part of a policy that does not depend on the family; implements `Policy` with it."""

    family: str

    @property
    @abstractmethod
    def module(self) -> nn.Module: ...

    @property
    @abstractmethod
    def num_steps(self) -> int: ...

    @property
    @abstractmethod
    def action_horizon(self) -> int: ...

    @property
    @abstractmethod
    def model_action_dim(self) -> int:
        """A, the width of the model's action vector."""

    @abstractmethod
    def prepare(self, observations: Sequence[Observation]) -> Any: ...

    @abstractmethod
    def encode(self, inputs: Any) -> Any: ...

    @abstractmethod
    def sample(self, prefix: Any, noise: Tensor, num_steps: int | None = None) -> Tensor: ...

    @abstractmethod
    def finish(self, actions: Tensor, inputs: Any) -> np.ndarray: ...

    @property
    def device(self) -> torch.device:
        """Where the network is: every linear layer may be replaced, the embeddings never are."""
        return next(self.module.parameters()).device

    def draw_noise(self, batch: int, seed: int) -> Tensor:
        """Standard normal float32 [batch, H, A], drawn on the CPU so that all devices agree."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.action_horizon, self.model_action_dim)
        return torch.randn(shape, generator=generator).to(self.device)

    @torch.no_grad()
    def infer(
        self,
        observation: Observation,
        *,
        seed: int = 0,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """One action chunk for one observation.

        Args:
            observation: raw images, state and instruction.
            seed: of the noise, where `noise` is not given.
            noise: [H, A] or [1, H, A].
            num_steps: denoising steps; None: the policy's own.

        Returns:
            float32 [H, action_dim], raw units.

        Raises:
            ObservationError: the observation does not fit the policy.
            ActionError: the network produced NaN or infinity.
        """
        inputs = self.prepare([observation])
        prefix = self.encode(inputs)
        if noise is None:
            noise = self.draw_noise(1, seed)
        noise = noise.reshape(1, self.action_horizon, self.model_action_dim).to(self.device)
        actions: np.ndarray = self.finish(self.sample(prefix, noise, num_steps), inputs)[0]
        check_actions(actions)
        return actions


def check_actions(actions: np.ndarray) -> None:
    """Raise ActionError unless every entry of actions [..., H, action_dim] is finite."""
    bad = ~np.isfinite(actions)
    if bad.any():
        *_, step, channel = np.argwhere(bad)[0]
        raise ActionError(
            f"the policy produced {int(bad.sum())} non-finite of {actions.size} action values, "
            f"the first at step {step}, channel {channel}; nothing was sent. Compare with the "
            "unquantized policy on the same observation (`omega-qvla compare`)"
        )


def check_side(side: str) -> Side:
    """`side` if it is one. Raises RecipeError."""
    for known in SIDES:
        if side == known:
            return known
    raise RecipeError(f"unknown side {side!r}; one of {', '.join(SIDES)}")
