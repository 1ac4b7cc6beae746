"""A model's own transformer block as one native call, where its layers allow it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from omega_qvla.kernels.block import BlockShape, Modulations, NativeBlock
from omega_qvla.kernels.cpu import NativeLayer
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.shared import watched
from omega_qvla.modules.step_context import current_step


class WholeBlock:
    """The layers of one block, run together."""

    def __init__(self, layers: Sequence[nn.Module], block: NativeBlock) -> None:
        self._layers, self._block = tuple(layers), block

    @classmethod
    def of(cls, groups: Sequence[Sequence[nn.Module]], shape: BlockShape) -> WholeBlock | None:
        """The block of four groups of linear layers, each of which is one native product: to
        queries (keys, values), from attention, to the inner width (gate, up), from it. None
        where a layer is not quantized, runs elsewhere, or is not joined with its group.
        """
        kernels = [_kernel(group) for group in groups]
        if any(kernel is None for kernel in kernels):
            return None
        layers = [layer for group in groups for layer in group]
        return cls(layers, NativeBlock(tuple(kernels), shape))  # type: ignore[arg-type]

    def __call__(
        self,
        x: Tensor,
        before: Modulations,
        after: Modulations,
        cache: tuple[Tensor, Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """See `NativeBlock`; None also while somebody watches a layer through a forward hook."""
        if any(watched(layer) for layer in self._layers):
            return None
        return self._block(x, before, after, cache, rope, current_step())


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
