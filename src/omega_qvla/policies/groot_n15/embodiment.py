"""Layers with one set of weights per embodiment, and the encoders built of them.

The weights of the running embodiment are selected once per observation (`select`); the
functions that take the selection then run in every denoising step without gathering again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu

from omega_qvla.kernels import rows
from omega_qvla.kernels.dense import PackedDense


class CategoryWeights(NamedTuple):
    """Selected weights [G, in, out] and biases [G, out]; G is 1 if the whole batch shares them.

    small: the same laid out for the product of small layers, where there is one.
    """

    weight: Tensor
    bias: Tensor
    small: PackedDense | None = None


class CategoryLinear(nn.Module):
    """x @ W[e] + b[e], with W [categories, in, out]."""

    fast = False

    def __init__(self, categories: int, source: int, target: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(categories, source, target))
        self.b = nn.Parameter(torch.zeros(categories, target))
        self._small: dict[tuple[int, int | None], PackedDense | None] = {}

    def select(self, ids: Tensor, first: int | None = None) -> CategoryWeights:
        """Weights of the embodiments `ids` [B], or [1] for one shared by the batch.

        first: `small` is of the first inputs only, and without the bias.
        """
        compiling = torch.compiler.is_compiling()
        if self.W.shape[0] == 1:
            one = 0
        elif ids.numel() == 1 and ids.device.type == "cpu" and not compiling:
            one = int(ids)  # a view, where gathering would copy the weights
        else:
            return CategoryWeights(self.W[ids], self.b[ids])
        kept = self.fast and not compiling and not torch.is_grad_enabled()
        small = self._packed(one, first) if kept else None
        return CategoryWeights(self.W[one : one + 1], self.b[one : one + 1], small)

    def _packed(self, one: int, first: int | None) -> PackedDense | None:
        """Made once: a fast model's weights do not change any more."""
        if (one, first) not in self._small:
            bias = self.b[one] if first is None else None
            self._small[one, first] = PackedDense.of(self.W[one, :first].T, bias)
        return self._small[one, first]


def category_matmul(x: Tensor, weight: Tensor, small: PackedDense | None = None) -> Tensor:
    """x [G * R, T, in] times weight [G, in, out]; R consecutive entries share one weight.

    small: this weight, laid out for it."""
    done = None if small is None else small(x)
    if done is not None:
        return done
    groups = weight.shape[0]
    if groups == 1:
        return x @ weight[0]
    folded = x.reshape(groups, -1, x.shape[-1])
    return torch.bmm(folded, weight).reshape(*x.shape[:-1], -1)


def category_linear(x: Tensor, selected: CategoryWeights) -> Tensor:
    """x [G * R, T, in] to [G * R, T, out]."""
    weight, bias, small = selected
    done = None if small is None else small(x)
    if done is not None:
        return done
    if weight.shape[0] == 1:
        return torch.addmm(bias[0], x.reshape(-1, x.shape[-1]), weight[0]).view(*x.shape[:-1], -1)
    folded = x.reshape(weight.shape[0], -1, x.shape[-1])
    return torch.baddbmm(bias[:, None], folded, weight).reshape(*x.shape[:-1], -1)


class CategoryMLP(nn.Module):
    """Linear, ReLU, Linear per embodiment."""

    def __init__(self, categories: int, source: int, hidden: int, target: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(categories, source, hidden)
        self.layer2 = CategoryLinear(categories, hidden, target)

    def select(self, ids: Tensor) -> tuple[CategoryWeights, CategoryWeights]:
        return self.layer1.select(ids), self.layer2.select(ids)

    @staticmethod
    def apply_selected(x: Tensor, layers: tuple[CategoryWeights, CategoryWeights]) -> Tensor:
        hidden = category_linear(x, layers[0])
        active = rows.gated("relu", hidden) if layers[0].small is not None else None
        return category_linear(relu(hidden) if active is None else active, layers[1])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, in], ids [B] or [1], to [B, T, out]."""
        return self.apply_selected(x, self.select(ids))


def action_time_code(buckets: Tensor, width: int) -> Tensor:
    """tau: [sin | cos] of bucket * 10000^(-i / (width/2)), float32 [N, width]."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=buckets.device)
    angles = buckets.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ActionEncoder(nn.Module):
    """W3(swish(W2([W1(x) | tau])))."""

    def __init__(self, categories: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.W1 = CategoryLinear(categories, action_dim, width)
        self.W2 = CategoryLinear(categories, 2 * width, width)
        self.W3 = CategoryLinear(categories, width, width)

    def select(self, ids: Tensor) -> tuple[CategoryWeights, CategoryWeights, CategoryWeights]:
        """W2's `small` is of the half that reads the actions."""
        half = self.W2.W.shape[-1]
        return self.W1.select(ids), self.W2.select(ids, half), self.W3.select(ids)

    def time_parts(self, tau: Tensor) -> Tensor:
        """`time_part` of tau [1, width] for each embodiment: [categories, 1, width]."""
        kinds = torch.arange(self.W2.W.shape[0], device=tau.device)
        return torch.cat([self.time_part(tau, self.W2.select(kind[None])) for kind in kinds])

    @staticmethod
    def time_part(tau: Tensor, w2: CategoryWeights) -> Tensor:
        """tau [N, width] or [1, width] times its half of W2, bias added: [N, 1, width]."""
        if tau.shape[0] < w2.weight.shape[0]:
            tau = tau.expand(w2.weight.shape[0], -1)
        half = w2.weight.shape[-1]
        return category_linear(tau[:, None], CategoryWeights(w2.weight[:, half:], w2.bias))

    @staticmethod
    def apply_selected(
        x: Tensor, tau: Tensor, layers: tuple[CategoryWeights, ...], time: Tensor | None = None
    ) -> Tensor:
        """x [N, H, action_dim], tau [N, width] or [1, width], to [N, H, width].

        tau is the same for all H actions, so its half of W2 is multiplied once per entry.
        time: `time_part` of the embodiments, where it was computed before.
        """
        w1, w2, w3 = layers
        hidden = category_linear(x, w1)
        width = hidden.shape[-1]
        if time is None:
            time = ActionEncoder.time_part(tau, w2)
        mixed = category_matmul(hidden, w2.weight[:, :width], w2.small)
        if 1 < time.shape[0] < mixed.shape[0]:
            time = time.repeat_interleave(mixed.shape[0] // time.shape[0], dim=0)
        if w2.small is not None:
            fast = rows.residual(mixed, time.expand(mixed.shape).contiguous())
            fast = None if fast is None else rows.gated("silu", fast)
            if fast is not None:
                return category_linear(fast, w3)
        return category_linear(silu(mixed + time), w3)
