"""Small linear layers in full precision, compiled: weights laid out once, bias included."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.kernels import rows

#: Elements of a weight up to which a layer is copied for these kernels (2 MiB). Larger ones gain
#: little over a library's product, whose own preparations no longer show, and would cost memory.
SMALL = 1 << 19


class PackedDense:
    """y = x W^T + b in float32; see csrc/dense.hpp. Its weights are a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        module = rows.compiled()
        assert module is not None  # `PackedDense.of` has looked
        self.out_features, self.in_features = weight.shape
        plain = weight.detach().contiguous()
        self.linear = module.Dense(plain, None if bias is None else bias.detach().contiguous())

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> PackedDense | None:
        """weight [out, in], bias [out]; None where the kernels are not built, or the layer is
        not small, not float32 or not on the CPU."""
        parts = [weight] if bias is None else [weight, bias]
        takes = all(t.is_cpu and t.dtype == torch.float32 for t in parts)
        if rows.compiled() is None or not takes or not 0 < weight.numel() <= SMALL:
            return None
        return cls(weight, bias)

    def __call__(self, x: Tensor) -> Tensor | None:
        """x [..., in] -> [..., out]; None where a gradient may be asked for, and for tensors
        that are not float32 on the CPU.

        Raises:
            NumericsError: x has another width.
        """
        if torch.is_grad_enabled() or not rows.fits(x):
            return None
        if x.shape[-1] != self.in_features:
            raise NumericsError(
                f"a layer of {self.in_features} inputs was given {list(x.shape)}; pass "
                f"[..., {self.in_features}]"
            )
        source = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        count = y.numel() // self.out_features
        self.linear.run(source.data_ptr(), count, y.data_ptr(), torch.get_num_threads())
        return y
