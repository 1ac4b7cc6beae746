"""Layers that stay in full precision, on the faster of the two products that torch has.

On x86, torch multiplies float32 matrices with MKL. Its oneDNN product, the one that compiled
graphs use, is about as fast on Intel's CPUs and twice as fast on AMD's (AVX-512, torch 2.13),
where MKL keeps to AVX2. Small layers have a product of their own (`kernels.dense`). All sum in
float32; results differ by rounding.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from omega_qvla.kernels.dense import SMALL, PackedDense

#: Multiply-adds below which the call itself costs more than the faster product saves.
WORTH_IT = 1_200_000


def onednn_available() -> bool:
    """Whether this machine and this torch have the other product."""
    known = platform.machine().lower() in ("x86_64", "amd64")
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return known and built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class DenseLinear(nn.Linear):
    """An `nn.Linear` with the same parameters; inference in float32 on the CPU is faster.

    The parameters must not change after the first call.
    """

    packed: PackedDense | None

    @classmethod
    def of(cls, layer: nn.Linear) -> DenseLinear:
        """`layer` with another forward; the parameters are the same objects."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made.packed = None
        made.train(layer.training)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.weight.numel() <= SMALL:
            small = self._small(x)
            if small is not None:
                return small
        if not self._takes(x):
            return linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, "none", [], ""
        )
        return out

    def _small(self, x: Tensor) -> Tensor | None:
        """The product of `kernels.dense`, whose copy of the weights is made at the first call:
        layers that run as part of a whole block need none."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self.packed is None:
            self.packed = PackedDense.of(self.weight, self.bias)
        return None if self.packed is None else self.packed(x)

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        return (
            x.numel() * self.out_features >= WORTH_IT
            and x.dtype == weight.dtype == torch.float32
            and x.is_cpu
            and weight.is_cpu
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and not torch.compiler.is_compiling()
        )


def use_dense(module: nn.Module) -> int:
    """Replace every plain `nn.Linear` inside `module` by a `DenseLinear`; how many there were."""
    if not onednn_available():
        return 0
    found = [(n, m) for n, m in module.named_modules() if type(m) is nn.Linear and n]
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, DenseLinear.of(layer))
    return len(found)
