"""The change of basis of a quantized layer's input: smooth, (rotate,) permute, rotate.

x' = R(P(x / d)) and W' = R(P(W * d)) leave x W^T unchanged. `rotation` are the values stored
in the pack, so that building and running use the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omega_qvla.config.recipe import Rotation
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.duquant import apply_shared, apply_shared_t
from omega_qvla.numerics.hadamard import full_hadamard, full_hadamard_t, fwht, fwht_t
from omega_qvla.numerics.permutation import inverse_permutation
from omega_qvla.numerics.rotation import apply_blocks, apply_blocks_t
from omega_qvla.numerics.symmetric import both_sides_


@dataclass(frozen=True)
class InputTransform:
    """Everything that happens to a layer's input before it is rounded.

    smooth: divisor [in]; permutation: integers [in]; blocks: [n_blocks, B, B] for the svd
    kinds, [1, B, B] for `duquant`; signs: +-1 [in] for randomized Hadamard kinds. first:
    [1, B, B] of `duquant`, before the permutation. None: that part is absent.
    """

    rotation: Rotation
    smooth: Tensor | None = None
    permutation: Tensor | None = None
    blocks: Tensor | None = None
    signs: Tensor | None = None
    first: Tensor | None = None

    def activations(self, x: Tensor) -> Tensor:
        """x [..., in] -> x' [..., in], in the dtype of x (float32 or float64)."""
        if self.smooth is not None:
            x = x / self.smooth.to(x.dtype)
        return self._permute_rotate(x)

    def weight(self, weight: Tensor) -> Tensor:
        """W [out, in] -> W' [out, in] of the same product."""
        if self.smooth is not None:
            weight = weight * self.smooth.to(weight.dtype)
        return self._permute_rotate(weight)

    def hessian_(self, hessian: Tensor) -> Tensor:
        """X^T X / n -> X'^T X' / n in place: the transform from both sides, no token needed."""
        return both_sides_(hessian, self.activations)

    def undo_weight(self, weight: Tensor) -> Tensor:
        """W' [out, in] -> the W whose product with the untransformed x is that of W' with x'.

        Note: not the inverse of `weight` (16-bit blocks are only nearly orthogonal) but the
        exact counterpart of `activations`: x' W'^T = x undo_weight(W')^T.
        """
        kind = self.rotation.kind
        if kind == "hadamard":
            weight = fwht_t(weight, self.rotation.block, self.signs)
        elif kind == "full_hadamard":
            weight = full_hadamard_t(weight, self.signs)
        elif kind == "duquant" and self.blocks is not None:
            weight = apply_shared_t(weight, self.blocks)
        elif self.blocks is not None:
            weight = apply_blocks_t(weight, self.blocks)
        if self.permutation is not None:
            weight = weight[:, inverse_permutation(self.permutation)]
        if self.first is not None:
            weight = apply_shared_t(weight, self.first)
        return weight if self.smooth is None else weight / self.smooth.to(weight.dtype)

    def _permute_rotate(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = apply_shared(x, self.first)
        if self.permutation is not None:
            x = x[..., self.permutation.long()]
        kind = self.rotation.kind
        if kind == "hadamard":
            return fwht(x, self.rotation.block, self.signs)
        if kind == "full_hadamard":
            return full_hadamard(x, self.signs)
        if kind != "none":
            if self.blocks is None:
                raise NumericsError(f"rotation {kind} without its stored blocks")
            return (apply_shared if kind == "duquant" else apply_blocks)(x, self.blocks)
        return x
