"""A model's own transformer block as one native call, where its layers allow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla.kernels.block import BlockLayer, BlockLayers, BlockShape, Modulations, NativeBlock
from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.kernels.dense import SMALL, PackedDense
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.shared import watched
from omega_qvla.modules.step_context import current_step

Groups = Sequence[Sequence[nn.Module]]


class WholeBlock:
    """The layers of one block, run together."""

    def __init__(self, layers: Sequence[nn.Module], block: NativeBlock) -> None:
        self._layers, self._block = tuple(layers), block

    @classmethod
    def of(
        cls,
        groups: Groups,
        shape: BlockShape,
        head_gains: tuple[Tensor, Tensor] | None = None,
    ) -> WholeBlock | None:
        """The block of four groups of linear layers, each of which is one product: to queries
        (keys, values), from attention, to the inner width (gate, up), from it.

        All of them native, or all of them small and in full precision (`kernels.dense`; their
        weights are copied). Queries may be native apart from keys and values. None where a
        layer runs elsewhere or is not joined with its group.

        head_gains: see `NativeBlock`.
        """
        layers = _native(groups) or _dense(groups)
        if layers is None:
            return None
        modules = [layer for group in groups for layer in group]
        return cls(modules, NativeBlock(layers, shape, head_gains))

    def __call__(
        self,
        x: Tensor,
        before: Modulations,
        after: Modulations,
        cache: tuple[Tensor, Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        keep: int | None = None,
    ) -> Tensor | None:
        """See `NativeBlock`; None also while somebody watches a layer through a forward hook."""
        if any(watched(layer) for layer in self._layers):
            return None
        return self._block(x, before, after, cache, rope, current_step(), keep)


def norm_rows(norm: nn.Module) -> Modulations:
    """The weights of a norm as a block of `plain` gains takes them; views, not copies."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.detach()[None], None if bias is None else bias.detach()[None], None


def _native(groups: Groups) -> BlockLayers | None:
    first, *others = groups
    query, into = None, _kernel(first)
    if into is None and len(first) == 3:
        query, into = _kernel(first[:1]), _kernel(first[1:])
        if query is None:
            return None
    return _all([into, *(_kernel(group) for group in others)], query)


def _dense(groups: Groups) -> BlockLayers | None:
    return _all([_packed(group) for group in groups])


def _all(
    layers: Sequence[BlockLayer | None], query: BlockLayer | None = None
) -> BlockLayers | None:
    into, out, up, down = layers
    if into is None or out is None or up is None or down is None:
        return None
    return BlockLayers(into, out, up, down, query)


def _packed(group: Sequence[nn.Module]) -> PackedDense | None:
    """Plain linear layers of one input, as one in full precision."""
    layers = [layer for layer in group if isinstance(layer, nn.Linear)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    size = sum(layer.weight.numel() for layer in layers)
    if len(layers) != len(group) or len(biases) not in (0, len(layers)) or size > SMALL:
        return None
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return PackedDense.of(weight, torch.cat([b.detach() for b in biases]) if biases else None)


def _kernel(group: Sequence[nn.Module]) -> NativeLayer | None:
    """The one native kernel that runs just these layers, in this order."""
    first = group[0]
    if not isinstance(first, QuantLinear):
        return None
    kernel = first.kernel
    if first.shared is not None:
        places = [(getattr(layer, "shared", None), getattr(layer, "place", 0)) for layer in group]
        if places != [(first.shared, i) for i in range(len(first.shared.sizes))]:
            return None
        kernel = first.shared.kernel
    elif len(group) > 1:
        return None
    whole = isinstance(kernel, NativeLayer) and kernel.linear is not None
    return kernel if isinstance(kernel, NativeLayer) and whole else None
