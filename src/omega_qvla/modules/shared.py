"""Layers that read the same input, run as one product: q, k and v; gate and up.

A model's code says which layers those are by calling `project`, which takes plain `nn.Linear`
layers as they come. Quantized ones that turn the input into the same integers were joined when
they were put in place (`modules.linear.replace_linears`): the input is then smoothed, rotated
and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.kernels.registry import Backend
from omega_qvla.modules.step_context import current_step
from omega_qvla.numerics.join import join_layers, same_input
from omega_qvla.numerics.layer import QuantizedLayer


class SharedProduct:
    """Several quantized layers in one kernel: x [..., in] -> all their outputs.

    Not a module: its layers are `QuantLinear`s at their own places in the network.
    """

    def __init__(
        self, joined: QuantizedLayer, sizes: Sequence[int], backend: Backend, device: torch.device
    ) -> None:
        """joined: see `numerics.join`; sizes: outputs of each of its layers."""
        self.sizes = list(sizes)
        self.kernel = backend.prepare(joined, device)

    @classmethod
    def of(
        cls,
        layers: Mapping[str, QuantizedLayer],
        names: Sequence[str],
        backend: Backend,
        device: torch.device,
    ) -> SharedProduct:
        """The product of these of `layers`, which are let go of before it is prepared."""
        return cls(*_join(layers, names), backend, device)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of one result, in the order of the layers."""
        return torch.split(self.kernel(x, current_step()), self.sizes, -1)


def _join(
    layers: Mapping[str, QuantizedLayer], names: Sequence[str]
) -> tuple[QuantizedLayer, list[int]]:
    parts = [layers[name] for name in names]
    return join_layers(parts), [part.out_features for part in parts]


def groups_by_input(
    layers: Mapping[str, QuantizedLayer], readers: Sequence[str]
) -> list[list[str]]:
    """Those of `readers` that are in `layers`, as groups (of two or more) with equal inputs."""
    groups: list[list[str]] = []
    for name in readers:
        if name not in layers:
            continue
        for group in groups:
            if same_input(layers[group[0]], layers[name]):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def watched(layer: nn.Module) -> bool:
    """Whether somebody waits at `layer` with a forward hook."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def joined(*layers: nn.Module) -> bool:
    """Whether `project` runs all these layers in one product."""
    shared = getattr(layers[0], "shared", None)
    return shared is not None and all(
        getattr(layer, "shared", None) is shared and not watched(layer) for layer in layers
    )


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs [..., out] of linear `layers` that all read x [..., in].

    Joined layers run once, the others each by themselves. So does a joined layer that
    somebody watches: his hook is called, at the price of the join.
    """
    done: dict[int, tuple[Tensor, ...]] = {}
    outputs = []
    for layer in layers:
        shared: Any = getattr(layer, "shared", None)
        if shared is None or watched(layer):
            outputs.append(layer(x))
            continue
        if id(shared) not in done:
            done[id(shared)] = shared(x)
        outputs.append(done[id(shared)][layer.place])  # type: ignore[index]
    return tuple(outputs)
