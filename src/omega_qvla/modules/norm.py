"""Layer norms with weights, in one compiled call.

torch shares a norm of a few thousand values among its threads, which then wait for more work
without sleep: on a machine without cores to spare, the kernels' own threads wait for them.
"""

from __future__ import annotations

from torch import Tensor, nn

from omega_qvla.kernels import rows


class CompiledLayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` over the last dimension, with the same parameters; inference in float32
    on the CPU is faster."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> CompiledLayerNorm:
        """`norm` with another forward; the parameters are the same objects."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.normalized_shape, made.eps = norm.normalized_shape, norm.eps
        made.elementwise_affine = norm.elementwise_affine
        made.weight, made.bias = norm.weight, norm.bias
        made.train(norm.training)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width], of the same shape."""
        fast = rows.layer_norm(x, self.eps, self.weight, self.bias, plus=0.0)
        return super().forward(x) if fast is None else fast


def use_compiled_norms(module: nn.Module) -> int:
    """Replace every plain `nn.LayerNorm` inside `module` that has weights and runs over the last
    dimension; how many were replaced: 0 where the kernels are not built."""
    if rows.compiled() is None:
        return 0
    found = [
        (name, part)
        for name, part in module.named_modules()
        if type(part) is nn.LayerNorm
        and name
        and len(part.normalized_shape) == 1
        and part.weight is not None
    ]
    for name, norm in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, CompiledLayerNorm.of(norm))
    return len(found)
