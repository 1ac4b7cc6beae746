"""A policy as somebody else might have written it: nothing is named or called as ours is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

WIDTH, STEPS = 32, 3


class Mixer(nn.Module):
    """Attention with its own names; keyword arguments only, layers called by keyword too."""

    def __init__(self, mixed: nn.Linear) -> None:
        super().__init__()
        self.w_query = nn.Linear(WIDTH, WIDTH)
        self.w_key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w_value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mixed = mixed

    def forward(self, *, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        source = tokens if memory is None else memory
        q = self.w_query(input=tokens)
        k, v = self.w_key(source), self.w_value(source)
        return self.mixed(scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """`mixed` is one layer for all blocks, registered in each."""

    def __init__(self, mixed: nn.Linear) -> None:
        super().__init__()
        self.mixer = Mixer(mixed)
        self.ff = nn.ModuleList([nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)])

    def forward(self, *, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        tokens = tokens + self.mixer(tokens=tokens, memory=memory)
        return tokens + self.ff[1](gelu(self.ff[0](tokens)))


class Stranger(nn.Module):
    """Two towers; actions by flow matching in `steps` Euler steps.

    Called as a whole it acts; `act` is another name for it. The step's number is told nobody.
    """

    def __init__(self, seed: int = 0, steps: int = STEPS) -> None:
        super().__init__()
        torch.manual_seed(seed)
        shared = nn.Linear(WIDTH, WIDTH)
        self.tower = nn.ModuleDict({"see": nn.ModuleList([Block(shared) for _ in range(2)])})
        self.flow = nn.ModuleDict(
            {
                "inject": nn.Linear(4, WIDTH),
                "trunk": nn.ModuleList([Block(nn.Linear(WIDTH, WIDTH)) for _ in range(2)]),
                "emit": nn.Linear(WIDTH, 4),
            }
        )
        self.steps = steps
        self.eval()

    def forward(self, *, obs: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
        return {"action": self.act(obs, noise)}

    def act(self, obs: dict[str, Tensor], noise: Tensor) -> Tensor:
        tokens = obs["tokens"]
        # openpi asks a projection for its dtype, too.
        kind = self.tower["see"][0].mixer.w_query.weight.dtype
        tokens, x = tokens.to(kind), noise
        for block in self.tower["see"]:
            tokens = block(tokens=tokens)
        for i in range(self.steps):
            h = self.flow["inject"](x.to(kind)) + i / self.steps
            for block in self.flow["trunk"]:
                h = block(tokens=h, memory=tokens)
            x = x + self.flow["emit"](h).to(x.dtype) / self.steps
        return x


BACKBONE, HEAD = r"^tower\..*(w_\w+|mixed|ff\.\d)$", r"^flow\.trunk\..*(w_query|mixed|ff\.\d)$"


def inputs(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """(obs, noise)."""
    generator = torch.Generator().manual_seed(seed)
    gains = 1 + 3 * torch.rand(WIDTH, generator=torch.Generator().manual_seed(99))
    tokens = gains * torch.randn(2, 6, WIDTH, generator=generator)
    return {"tokens": tokens}, torch.randn(2, 5, 4, generator=generator)


def calibrate(policy: nn.Module, count: int = 4) -> None:
    """Runs it on `count` inputs."""
    for seed in range(count):
        obs, noise = inputs(seed)
        policy(obs=obs, noise=noise)
