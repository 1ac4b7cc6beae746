"""A two-layer "policy" with a backbone and a denoising loop, and its 4-bit twin."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.config.presets import preset
from omega_qvla.modules.linear import replace_linears
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.policies.observation import Observation

LAYERS = {"backbone.fc": "backbone", "head.fc": "action_head"}


class ToyPolicy:
    family, num_steps, action_dim, action_horizon, cameras = "toy", 4, 3, 6, ("base",)

    def __init__(self, seed: int = 0, width: int = 64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.module = nn.ModuleDict(
            {
                "backbone": nn.ModuleDict({"fc": nn.Linear(width, width)}),
                "head": nn.ModuleDict({"fc": nn.Linear(width, width, bias=False)}),
                "out": nn.Linear(width, 3),
                "lift": nn.Linear(3, width),
            }
        )
        for parameter in self.module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
        self.outlier = torch.ones(width)

    def prepare(self, observations: list[Observation]) -> Tensor:
        return torch.stack([torch.from_numpy(o.state) for o in observations])

    def encode(self, inputs: Tensor) -> Tensor:
        return self.module["backbone"]["fc"](inputs * self.outlier)

    def sample(self, prefix: Tensor, noise: Tensor, num_steps: int | None = None) -> Tensor:
        x = noise
        for step in range(self.num_steps):
            with denoising_step(step, self.num_steps):
                hidden = (step + 1) * (prefix[:, None] + self.module["lift"](x))
                x = x + self.module["out"](self.module["head"]["fc"](hidden)) / self.num_steps
        return x

    def finish(self, actions: Tensor, inputs: Tensor) -> np.ndarray:
        return actions.numpy()

    def draw_noise(self, batch: int, seed: int) -> Tensor:
        return torch.randn(batch, 6, 3, generator=torch.Generator().manual_seed(seed))


def observations(count: int, width: int = 64, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((count, width)).astype(np.float32)
    return [Observation({}, state, "") for state in states]


def quantized(
    policy: ToyPolicy, recipe: str = "rtn"
) -> tuple[ToyPolicy, dict[str, QuantizedLayer]]:
    scheme = preset(recipe).backbone.scheme
    layers = {}
    for name, side in LAYERS.items():
        linear = policy.module.get_submodule(name)
        steps = policy.num_steps if side == "action_head" else None
        layers[name] = quantize_layer(name, side, linear.weight, linear.bias, scheme, None, steps)
    twin = copy.deepcopy(policy)
    replace_linears(twin.module, layers, "emulated")
    return twin, layers
