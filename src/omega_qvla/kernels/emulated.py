"""The emulated backend: integers in floating point, for any device and scheme.

Integer products are sums of integers in float32 (float64 where those could pass 2^24), so they
are exact; everything around them is done in the order that `kernels.reference` defines, so the
result has the same bits as the oracle's and as a native backend's. Everything that does not
depend on the input is prepared once; a call is a few dozen torch ops.

Weight-only schemes multiply by the dequantized weight, taken back to the original basis:
one product, nothing else. Do not run under autocast: sums in bfloat16 are not exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from omega_qvla.kernels import arithmetic
from omega_qvla.kernels.prologue import build_prologue, dense_blocks
from omega_qvla.kernels.reference import every_scheme
from omega_qvla.kernels.registry import Capabilities, Kernel, StepLike, table_row
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import expand_groups, qrange
from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.numerics.rtn import dequantize

# (x' [n, in], step) -> scaled product [n, out]
Product = Callable[[Tensor, "StepLike | None"], Tensor]
_EXACT = 1 << 24  # float32 holds every integer up to here
_PARTIAL_SUMS = 1 << 22  # elements of per-group sums kept at once


class EmulatedBackend:
    """Runs every scheme, in floating point."""

    name = "emulated"

    def capabilities(self) -> Capabilities:
        """Every activation kind, 4, 6 and 8 bits, CPU and CUDA; not native."""
        return every_scheme(self.name)

    def available(self) -> tuple[bool, str]:
        """Always: it is plain torch."""
        return True, "plain torch"

    def prepare(self, layer: QuantizedLayer, device: torch.device) -> Kernel:
        """(x [..., in], step) -> y [..., out] in the dtype of x; unpacked weights are cached."""
        layer = layer.to(device)
        if layer.scheme.activation.kind == "none":
            return _dense_kernel(layer)
        prologue, product, epilogue = (
            build_prologue(layer, device),
            _build_product(layer),
            _build_epilogue(layer),
        )
        width, out = layer.in_features, layer.out_features

        def kernel(x: Tensor, step: StepLike | None) -> Tensor:
            rotated = prologue(x.reshape(-1, width).float())
            y = epilogue(product(rotated, step), rotated)
            return y.view(*x.shape[:-1], out).to(x.dtype)

        return kernel


def _dense_kernel(layer: QuantizedLayer) -> Kernel:
    """Weights only: one product with the weight in the original basis."""
    group = layer.scheme.weight.group
    weight = dequantize(layer.integers(), layer.weight_scale.double(), group)
    if layer.lowrank_a is not None and layer.lowrank_b is not None:
        weight += layer.lowrank_a.double() @ layer.lowrank_b.double().T
    if layer.output_rotation is not None:
        weight = apply_blocks(weight.T, layer.output_rotation.double()).T
    weight = layer.transform.undo_weight(weight).float().contiguous()
    bias = layer.bias

    def kernel(x: Tensor, step: StepLike | None) -> Tensor:
        return linear(x.float(), weight, bias).to(x.dtype)

    return kernel


def _build_product(layer: QuantizedLayer) -> Product:
    if layer.scheme.activation.kind == "per_step_channel":
        return _channel_product(layer)
    if arithmetic.segmentation(layer)[1] == 1:
        return _plain_product(layer)
    return _segmented_product(layer)


def _sum_dtype(layer: QuantizedLayer, terms: int) -> torch.dtype:
    """float32 where sums of `terms` integer products are exact in it, else float64."""
    weight_bits = max(4, layer.scheme.weight.bits)
    largest = terms * -qrange(weight_bits)[0] * -qrange(layer.scheme.activation.bits)[0]
    return torch.float32 if largest <= _EXACT else torch.float64


# x' before its norm [n, groups, group or in], step -> (q of the same shape, scale [n or 1, groups
# or 1, 1])
_Quantizer = Callable[[Tensor, "StepLike | None"], tuple[Tensor, Tensor]]


def _quantizer(layer: QuantizedLayer) -> _Quantizer:
    act = layer.scheme.activation
    low, high = qrange(act.bits)
    if not act.static:
        factor, grouped = arithmetic.clip_factor(layer), arithmetic.activation_group(layer) > 0
        largest = arithmetic.sign_factor(layer)
        norm = torch.tensor(arithmetic.rotation_norm(layer), device=layer.qweight.device)

        def dynamic(u: Tensor, step: StepLike | None) -> tuple[Tensor, Tensor]:
            scale = arithmetic.dynamic_scale(u, factor, largest)
            if grouped:
                scale = scale.bfloat16().float()  # `arithmetic.round_scale`
            return torch.mul(u, norm / scale).round_().clamp_(low, high), scale

        return dynamic
    assert layer.act_scale is not None
    scales = arithmetic.round_scale(layer.act_scale.unsqueeze(-1), layer)
    inverses = arithmetic.inverse_scale(scales, layer)

    def static(u: Tensor, step: StepLike | None) -> tuple[Tensor, Tensor]:
        row = table_row(layer, step)
        q = torch.mul(u, inverses[row]).round_().clamp_(low, high)
        return q, scales[row : row + 1]

    return static


def _plain_product(layer: QuantizedLayer) -> Product:
    """One scale per row of weights, one per token or step: one product, scaled at the end."""
    dtype = _sum_dtype(layer, layer.in_features)
    weight = layer.integers().to(dtype).T.contiguous()
    row_scale = layer.weight_scale.float().T
    quantize = _quantizer(layer)

    def product(u: Tensor, step: StepLike | None) -> Tensor:
        q, scale = quantize(u.unsqueeze(1), step)
        sums = torch.mm(q.squeeze(1).to(dtype), weight).float()
        return sums.mul_(scale.squeeze(1)).mul_(row_scale)

    return product


def _channel_product(layer: QuantizedLayer) -> Product:
    """A scale per channel does not leave the sum: rounded input times dequantized weight."""
    weight = dequantize(layer.integers(), layer.weight_scale.float(), layer.scheme.weight.group)
    table, (low, high) = layer.act_scale, qrange(layer.scheme.activation.bits)
    assert table is not None

    def product(x: Tensor, step: StepLike | None) -> Tensor:
        scale = table[table_row(layer, step)]
        return linear((x / scale).round_().clamp_(low, high).mul_(scale), weight)

    return product


def _segmented_product(layer: QuantizedLayer) -> Product:
    """Scales per group on either side: one exact integer sum per segment, scaled, then added."""
    width, out = layer.in_features, layer.out_features
    size, segments = arithmetic.segmentation(layer)
    group = arithmetic.activation_group(layer) or segments * size
    groups = -(-width // group)
    repeat, missing = group // size, groups * group - width
    dtype = _sum_dtype(layer, size)
    weight = pad(layer.integers(), (0, segments * size - width)).to(dtype)
    weight = weight.view(out, segments, size).permute(1, 2, 0).contiguous()
    segment_scale, row_scale = None, layer.weight_scale.float().T
    if weight_group := arithmetic.weight_group(layer):
        columns = expand_groups(layer.weight_scale.float(), width, weight_group)
        segment_scale = columns[:, ::size].T.unsqueeze(1).contiguous()  # [segments, 1, out]
    quantize = _quantizer(layer)

    def product(u: Tensor, step: StepLike | None) -> Tensor:
        u = pad(u, (0, missing)) if missing else u
        q, scale = quantize(u.view(-1, groups, group), step)
        q = q.view(-1, groups * repeat, size).transpose(0, 1)
        if groups * repeat > segments:
            q = q[:segments]
        if groups == 1:  # one scale for the whole row, or the step: it leaves the sum
            y = _segment_sums(q.to(dtype), weight, None, segment_scale)
            y.mul_(scale.squeeze(1))
        else:
            if repeat > 1:
                scale = scale.repeat_interleave(repeat, dim=1)[:, :segments]
            y = _segment_sums(q.to(dtype), weight, scale.transpose(0, 1), segment_scale)
        return y if segment_scale is not None else y.mul_(row_scale)

    return product


def _segment_sums(
    q: Tensor, weight: Tensor, x_scale: Tensor | None, segment_scale: Tensor | None
) -> Tensor:
    """q [segments, n, size], weight [segments, size, out], scales [segments, n or 1, 1] and
    [segments, 1, out] -> the scaled sums added from the first segment to the last: [n, out].
    """
    segments, rows, out = q.shape[0], q.shape[1], weight.shape[2]
    chunk = max(1, _PARTIAL_SUMS // max(1, rows * out))
    total = torch.zeros(rows, out, device=q.device)
    for start in range(0, segments, chunk):
        part = slice(start, start + chunk)
        sums = torch.bmm(q[part], weight[part]).float()
        if x_scale is not None:
            sums.mul_(x_scale[part])
        if segment_scale is not None:
            sums.mul_(segment_scale[part])
        for terms in sums.unbind(0):
            total.add_(terms)
    return total


def _build_epilogue(layer: QuantizedLayer) -> Callable[[Tensor, Tensor], Tensor]:
    """(scaled product [n, out], x' before its norm [n, in]) -> y: low rank, output rotation,
    bias."""
    add_low_rank = None if layer.lowrank_a is None else _low_rank(layer)
    undo = None
    if layer.output_rotation is not None:
        undo = dense_blocks(layer.output_rotation.float(), layer.out_features)
    bias = layer.bias

    def epilogue(y: Tensor, rotated: Tensor) -> Tensor:
        if add_low_rank is not None:
            y = add_low_rank(y, rotated)
        if undo is not None:
            y = undo(y)
        return y if bias is None else y.add_(bias)

    return epilogue


def _low_rank(layer: QuantizedLayer) -> Callable[[Tensor, Tensor], Tensor]:
    """(y [n, out], x' before its norm) -> y plus the low-rank terms, one after the other."""
    assert layer.lowrank_a is not None and layer.lowrank_b is not None
    a = layer.lowrank_a.float().T.contiguous()
    b = layer.lowrank_b.float()
    if not layer.scheme.native:
        return lambda y, x: torch.addmm(y, torch.mm(x, b), a)
    b = b.mul(arithmetic.rotation_norm(layer)).double()

    def add(y: Tensor, u: Tensor) -> Tensor:
        shares = arithmetic.round_share(torch.mm(u.double(), b))
        # share * a is exact, so that a fused multiply-add rounds as two instructions do.
        for share, terms in zip(torch.split(shares, 1, dim=1), a, strict=True):
            y = torch.addcmul(y, share, terms)
        return y

    return add
