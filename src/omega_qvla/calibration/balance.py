"""QuantVLA's two corrections: attention temperature matching and output head balancing.

Zhang et al. 2026, arXiv:2602.20309. The attention projections of the action head stay in 16
bits; what reaches them is quantized, which sharpens or flattens the attention and changes the
energy that it adds to the residual stream. So the queries of each head are scaled by the ratio of
the standard deviations of the logits, full precision over quantized (temperature), and each
layer's output by the ratio of its rms (balance). Both are row gains of layers that a pack holds.

Public code bounds a gain to 0.8 .. 1.25 and drops one within 5% of 1; so is it here, for both.
Logits are taken before the rotary embedding and over the layer's own keys (not those of a cached
prefix), which is all that the projections' outputs show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.calibration.collect import noise_seed
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.errors import CalibrationError
from omega_qvla.modules.linear import quantized_linears
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.policies.base import Policy

LOWEST, HIGHEST, NEUTRAL = 0.8, 1.25, 0.05
# queries -> (keys, output projection) beside them
_PARTNERS = {"q_proj": ("k_proj", "o_proj"), "to_q": ("to_k", "to_out.0")}


def balanced(
    policy: Policy, samples: ObservationSet | None, layers: dict[str, QuantizedLayer], seed: int
) -> dict[str, QuantizedLayer]:
    """`layers` with the row gains that their schemes' `balance` asks for; others as they are.

    The policy runs on every observation twice, in full precision and quantized, and is left as
    it was.

    Raises:
        CalibrationError: no samples, or an attention layer without its keys.
    """
    wanted = {name: layer for name, layer in layers.items() if layer.scheme.balance != "none"}
    if not wanted:
        return layers
    if samples is None:
        raise CalibrationError(
            "this recipe balances attention by running the policy: give samples, not only a "
            "calibration made from them"
        )
    exact = _measure(policy, samples, wanted, seed)
    with quantized_linears(policy.module, layers, "emulated"):
        quantized = _measure(policy, samples, wanted, seed)
    result = dict(layers)
    for name, layer in wanted.items():
        result[name] = _scaled(layer, bounded_gain(exact[name], quantized[name]))
    return result


def bounded_gain(exact: Tensor, quantized: Tensor) -> Tensor:
    """exact / quantized, bounded, and exactly 1 where it is nearly 1; any shape."""
    gain = (exact / quantized.clamp_min(1e-6)).clamp(LOWEST, HIGHEST)
    return torch.where((gain - 1).abs() <= NEUTRAL, torch.ones_like(gain), gain)


def _scaled(layer: QuantizedLayer, gain: Tensor) -> QuantizedLayer:
    """Rows of the layer times the gain of their head (gain [heads] or [1])."""
    rows = gain.repeat_interleave(layer.out_features // len(gain)).half()
    bias = None if layer.bias is None else layer.bias * rows.float()
    return dataclasses.replace(layer, weight_scale=rows[:, None].contiguous(), bias=bias)


def _measure(
    policy: Policy, samples: ObservationSet, wanted: Mapping[str, QuantizedLayer], seed: int
) -> dict[str, Tensor]:
    """Layer -> mean over all its calls of the logits' deviation per head, or of its rms [1]."""
    meters = {name: _meter(policy.module, name, layer) for name, layer in wanted.items()}
    handles = [handle for meter in meters.values() for handle in meter.watch(policy.module)]
    try:
        with torch.no_grad():
            for index, observation in enumerate(samples):
                prefix = policy.encode(policy.prepare([observation]))
                policy.sample(prefix, policy.draw_noise(1, noise_seed(seed, index)))
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, meter in meters.items() if meter.count == 0]
    if silent:
        raise CalibrationError(f"layer {silent[0]} never ran; leave it out of the recipe")
    return {name: meter.mean() for name, meter in meters.items()}


class _Meter:
    """Running mean of the rms of a layer's output; `total` [1]."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.total = torch.zeros(1, dtype=torch.float64)

    def watch(self, module: nn.Module) -> list[Any]:
        """Hooks that measure until they are removed."""
        return [module.get_submodule(self.name).register_forward_hook(self._hook)]

    def mean(self) -> Tensor:
        """The mean over all calls."""
        return self.total / max(self.count, 1)

    def _hook(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.add(output.double().square().mean().sqrt().cpu())

    def add(self, value: Tensor) -> None:
        """Account for one call."""
        self.total, self.count = self.total + value, self.count + 1


class _LogitMeter(_Meter):
    """Running mean, per head, of the deviation of queries times keys; `total` [heads].

    Measured when the output projection runs: by then both are there, whichever came first,
    and keys that serve every denoising step are those of the one call that made them.
    """

    def __init__(self, name: str, head_dim: int) -> None:
        super().__init__(name)
        self._head_dim = head_dim
        self._seen: dict[str, Tensor] = {}
        prefix, _, own = name.rpartition(".")
        self._keys, self._output = (f"{prefix}.{other}" for other in _PARTNERS[own])

    def watch(self, module: nn.Module) -> list[Any]:
        hooks = [
            module.get_submodule(name).register_forward_hook(self._keeper(kind))
            for kind, name in (("queries", self.name), ("keys", self._keys))
        ]
        output = module.get_submodule(self._output)
        return [*hooks, output.register_forward_pre_hook(self._at_output)]

    def _keeper(self, kind: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
            heads = output.detach().float()
            heads = heads.reshape(-1, heads.shape[-1] // self._head_dim, self._head_dim)
            self._seen[kind] = heads.transpose(0, 1)

        return keep

    def _at_output(self, module: nn.Module, arguments: Any) -> None:
        queries, keys = self._seen["queries"], self._seen["keys"]  # [heads, n, head_dim]
        keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
        logits = queries @ keys.mT * self._head_dim**-0.5
        self.add(logits.flatten(1).std(dim=1, correction=0).double().cpu())


def _meter(module: nn.Module, name: str, layer: QuantizedLayer) -> _Meter:
    if layer.scheme.balance == "output":
        return _Meter(name)
    prefix, _, own = name.rpartition(".")
    if own not in _PARTNERS:
        known = ", ".join(_PARTNERS)
        raise CalibrationError(f"layer {name} has no temperature: it is none of {known}")
    attention = module.get_submodule(prefix)
    head_dim, heads = getattr(attention, "head_dim", None), getattr(attention, "heads", None)
    if isinstance(heads, int):
        head_dim = layer.out_features // heads
    if not isinstance(head_dim, int):
        raise CalibrationError(f"layer {name}: its attention does not say how many heads it has")
    return _LogitMeter(name, head_dim)
