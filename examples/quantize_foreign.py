"""Quantize a policy object that omega-qvla did not load, in place.

    python examples/quantize_foreign.py

The policy below stands for one of openpi, LeRobot or Isaac-GR00T in its own environment;
docs/from-the-published-code.md says what `head` and `entry` are for each of those.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from omega_qvla import attach_pack, preset, quantize_


class Attention(nn.Module):
    """One head, with the names its author liked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ask, self.key, self.val = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.mix = nn.Linear(width, width)

    def forward(self, *, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.mix(
            nn.functional.scaled_dot_product_attention(
                self.ask(x), self.key(memory), self.val(memory)
            )
        )


class Policy(nn.Module):
    """Sees once, then moves noise to actions in `steps` steps."""

    def __init__(self, width: int = 128, steps: int = 4) -> None:
        super().__init__()
        self.see = nn.ModuleList(Attention(width) for _ in range(2))
        self.noisy_in, self.velocity = nn.Linear(7, width), nn.Linear(width, 7)
        self.act = nn.ModuleList(Attention(width) for _ in range(2))
        self.steps = steps

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        memory = observation
        for layer in self.see:
            memory = layer(x=memory, memory=memory)
        actions = noise
        for _ in range(self.steps):
            x = self.noisy_in(actions)
            for layer in self.act:
                x = layer(x=x, memory=memory)
            actions = actions + self.velocity(x) / self.steps
        return actions


def make_policy() -> Policy:
    """The same weights every time, as from a checkpoint."""
    torch.manual_seed(0)
    return Policy().eval()


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """(observation, noise)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 10, 7, generator=generator)
    return torch.randn(1, 20, 128, generator=generator), noise


@torch.no_grad()
def main() -> float:
    """Quantize, save, put the pack into a fresh policy; returns the relative change."""
    policy = make_policy()
    expected = policy(*draw(100))

    def calibrate() -> None:
        """One call per observation; called more than once, so it must repeat itself."""
        for seed in range(10):
            policy(*draw(seed))

    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "policy.safetensors"
        attached = quantize_(
            policy,
            preset("omega-paper"),  # a static scale per denoising step: the steps matter
            calibrate,
            backbone=r"^see\.",
            action_head=r"^act\.\d+\.(ask|mix)$",
            head="noisy_in",  # called once per denoising step
            out=pack,
        )
        print(f"{len(attached.layers)} layers quantized, run by {attached.backend}")
        actions = policy(*draw(100))
        fresh = make_policy()
        attach_pack(fresh, pack)
        print(
            f"from the pack: {'the same' if torch.equal(fresh(*draw(100)), actions) else 'WRONG'}"
        )
    change = float((actions - expected).norm() / expected.norm())
    print(f"relative change of the action chunk: {change:.3f}")
    return change


if __name__ == "__main__":
    main()
