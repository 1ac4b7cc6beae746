"""A policy of a few linears whose every input can be written down independently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.modules.step_context import denoising_step
from omega_qvla.policies.observation import Observation

WIDTH, TOKENS, HORIZON = 8, 5, 3


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.act, self.cross = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class ToyPolicy:
    """prepare: the state is the token matrix. `skipped`: a step that never runs `act`."""

    family = "toy"
    num_steps = 4

    def __init__(self, skipped: int | None = None, poison: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = Toy()
        self.skipped, self.poison = skipped, poison

    def prepare(self, observations: Sequence[Observation]) -> Tensor:
        return torch.stack([torch.from_numpy(o.state) for o in observations])

    def encode(self, inputs: Tensor) -> Tensor:
        x = torch.tanh(inputs)
        hidden = self.module.q(x) + self.module.k(x)
        out: Tensor = self.module.out(hidden)
        return out

    def draw_noise(self, batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, HORIZON, WIDTH, generator=generator)

    def step_input(self, x: Tensor, step: int) -> Tensor:
        return x * (step + 1)

    def sample(self, prefix: Any, noise: Tensor, num_steps: int | None = None) -> Tensor:
        steps = self.num_steps if num_steps is None else num_steps
        x = noise + self.module.cross(prefix).mean()
        for step in range(steps):
            with denoising_step(step, steps):
                if step == self.skipped:
                    continue
                given = self.step_input(x, step)
                if step == self.poison:
                    given[0, 0, 0] = float("nan")
                self.module.act(given)
        return x
