"""The emulated backend: integers in floating point, for any device and scheme.

Integer products are sums of integers in float32 (float64 where those could pass 2^24), so
they are exact; scales multiply them afterwards, as on integer hardware. Everything that does
not depend on the input is prepared once; a call is a handful of torch ops.

Weight-only schemes multiply by the dequantized weight, taken back to the original basis:
one product, nothing else. Do not run under autocast: sums in bfloat16 are not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from omega_qvla.kernels.prologue import block_product, build_prologue
from omega_qvla.kernels.reference import ACTIVATION_KINDS
from omega_qvla.kernels.registry import Capabilities, Kernel, StepLike, table_row
from omega_qvla.numerics.activation import expand_static
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.qparams import expand_groups, group_count, qrange
from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.numerics.rtn import dequantize

# (x' [n, in], step) -> scaled product [n, out]
Product = Callable[[Tensor, "StepLike | None"], Tensor]
_TINY = torch.finfo(torch.float32).tiny
_EXACT = 1 << 24  # float32 holds every integer up to here
_PARTIAL_SUMS = 1 << 22  # elements of per-group sums kept at once


class EmulatedBackend:
    """Runs every scheme, in floating point."""

    name = "emulated"

    def capabilities(self) -> Capabilities:
        """Every activation kind, 4, 6 and 8 bits, CPU and CUDA; not native."""
        devices = frozenset({"cpu", "cuda"})
        return Capabilities(self.name, False, ACTIVATION_KINDS, frozenset({4, 6, 8}), devices)

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
    kind = layer.scheme.activation.kind
    if kind == "per_step_channel":
        return _channel_product(layer)
    grouped = layer.scheme.weight.group is not None or kind in ("per_token_group", "per_step_group")
    if grouped:
        return _grouped_product(layer)
    return _plain_product(layer)


def _sum_dtype(layer: QuantizedLayer, terms: int) -> torch.dtype:
    """float32 where sums of `terms` integer products are exact in it, else float64."""
    largest = terms * -qrange(4)[0] * -qrange(layer.scheme.activation.bits)[0]
    return torch.float32 if largest <= _EXACT else torch.float64


def _plain_product(layer: QuantizedLayer) -> Product:
    """One scale per row of weights, one per token or step: one product, scaled at the end."""
    act = layer.scheme.activation
    dtype = _sum_dtype(layer, layer.in_features)
    weight = layer.integers().to(dtype).T.contiguous()
    row_scale = layer.weight_scale.float().T
    (low, high), factor = qrange(act.bits), act.clip / qrange(act.bits)[1]
    if act.kind == "per_token":

        def per_token(x: Tensor, step: StepLike | None) -> Tensor:
            q, scale = _dynamic(x, factor, low, high)
            return torch.mm(q.to(dtype), weight).float().mul_(scale).mul_(row_scale)

        return per_token
    table = layer.act_scale
    assert table is not None

    def per_step(x: Tensor, step: StepLike | None) -> Tensor:
        scale = table[table_row(layer, step)]
        q = (x / scale).round_().clamp_(low, high)
        return torch.mm(q.to(dtype), weight).float().mul_(scale).mul_(row_scale)

    return per_step


def _dynamic(x: Tensor, factor: float, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` with one op less: a zero token gets a tiny scale, and still q = 0."""
    scale = x.abs().amax(-1, keepdim=True).mul_(factor).clamp_min_(_TINY)
    return (x / scale).round_().clamp_(low, high), scale


def _channel_product(layer: QuantizedLayer) -> Product:
    """A scale per channel does not leave the sum: rounded input times dequantized weight."""
    weight = dequantize(layer.integers(), layer.weight_scale.float(), layer.scheme.weight.group)
    table, (low, high) = layer.act_scale, qrange(layer.scheme.activation.bits)
    assert table is not None

    def product(x: Tensor, step: StepLike | None) -> Tensor:
        scale = table[table_row(layer, step)]
        return linear((x / scale).round_().clamp_(low, high).mul_(scale), weight)

    return product


def _segment(layer: QuantizedLayer) -> tuple[int, int]:
    """(columns per segment, segments): within a segment both scales are constant."""
    act, group = layer.scheme.activation, layer.scheme.weight.group
    sizes = [group] if group is not None else []
    if act.kind in ("per_token_group", "per_step_group"):
        sizes.append(act.group)
    size = math.gcd(*sizes)
    if size >= layer.in_features:
        size = layer.in_features
    return size, group_count(layer.in_features, size)


def _grouped_product(layer: QuantizedLayer) -> Product:
    """Scales per group on either side: one exact integer sum per segment, scaled, then added."""
    weight_group, width = layer.scheme.weight.group, layer.in_features
    size, segments = _segment(layer)
    dtype = _sum_dtype(layer, size)
    padding = segments * size - width
    weight = pad(layer.integers(), (0, padding)).to(dtype)
    weight = weight.view(layer.out_features, segments, size).permute(1, 2, 0).contiguous()
    row_scale = segment_scale = None
    if weight_group is None:
        row_scale = layer.weight_scale.float().T
    else:
        columns = expand_groups(layer.weight_scale.float(), width, weight_group)
        segment_scale = columns[:, ::size].T.unsqueeze(1).contiguous()  # [segments, 1, out]
    quantize = _segment_quantizer(layer, size, segments)

    def product(x: Tensor, step: StepLike | None) -> Tensor:
        q, x_scale = quantize(pad(x, (0, padding)) if padding else x, step)
        y = _segment_sums(q.to(dtype), weight, x_scale, segment_scale)
        return y if row_scale is None else y.mul_(row_scale)

    return product


# (x' [n, segments * size], step) -> (q [segments, n, size], scale [segments, n or 1, 1])
_SegmentQuantizer = Callable[[Tensor, "StepLike | None"], tuple[Tensor, Tensor]]


def _segment_quantizer(layer: QuantizedLayer, size: int, segments: int) -> _SegmentQuantizer:
    act, width = layer.scheme.activation, layer.in_features
    (low, high), factor = qrange(act.bits), act.clip / qrange(act.bits)[1]
    if act.kind == "per_token":

        def per_token(x: Tensor, step: StepLike | None) -> tuple[Tensor, Tensor]:
            q, scale = _dynamic(x, factor, low, high)
            return q.view(-1, segments, size).transpose(0, 1), scale.unsqueeze(0)

        return per_token
    if act.kind == "per_token_group":
        group = min(act.group, segments * size)
        repeat = group // size
        groups = group_count(segments * size, group)
        missing = groups * group - segments * size

        def per_group(x: Tensor, step: StepLike | None) -> tuple[Tensor, Tensor]:
            x = pad(x, (0, missing)) if missing else x
            q, scale = _dynamic(x.view(-1, groups, group), factor, low, high)
            if repeat > 1:
                scale = scale.repeat_interleave(repeat, dim=1)
            q = q.view(-1, groups * repeat, size)[:, :segments].transpose(0, 1)
            return q, scale[:, :segments].transpose(0, 1)

        return per_group
    assert layer.act_scale is not None
    columns = torch.stack(
        [expand_static(row, width, act.kind, act.group).expand(width) for row in layer.act_scale]
    )
    columns = pad(columns, (0, segments * size - width), value=1.0)
    by_segment = columns[:, ::size].unsqueeze(-1).unsqueeze(-1).contiguous()

    def per_step(x: Tensor, step: StepLike | None) -> tuple[Tensor, Tensor]:
        row = table_row(layer, step)
        q = (x / columns[row]).round_().clamp_(low, high)
        return q.view(-1, segments, size).transpose(0, 1), by_segment[row]

    return per_step


def _segment_sums(
    q: Tensor, weight: Tensor, x_scale: Tensor, segment_scale: Tensor | None
) -> Tensor:
    """sum over segments of (q @ weight) * scales: [n, out], a bounded number at a time."""
    segments, rows, out = q.shape[0], q.shape[1], weight.shape[2]
    chunk = max(1, _PARTIAL_SUMS // max(1, rows * out))
    total: Tensor | None = None
    for start in range(0, segments, chunk):
        part = slice(start, start + chunk)
        scale = x_scale if x_scale.shape[0] == 1 else x_scale[part]
        sums = torch.bmm(q[part], weight[part]).float().mul_(scale)
        if segment_scale is not None:
            sums.mul_(segment_scale[part])
        added = sums.sum(0)
        total = added if total is None else total.add_(added)
    assert total is not None
    return total


def _build_epilogue(layer: QuantizedLayer) -> Callable[[Tensor, Tensor], Tensor]:
    """(scaled product [n, out], x' [n, in]) -> y: low rank, output rotation, bias."""
    a = None if layer.lowrank_a is None else layer.lowrank_a.float().T.contiguous()
    b = None if layer.lowrank_b is None else layer.lowrank_b.float()
    rotation = None if layer.output_rotation is None else layer.output_rotation.float()
    undo = None
    if rotation is not None and layer.out_features % rotation.shape[-1] == 0:
        undo = block_product(rotation)
    elif rotation is not None:

        def undo(y: Tensor) -> Tensor:
            return apply_blocks(y, rotation)

    bias = layer.bias

    def epilogue(y: Tensor, rotated: Tensor) -> Tensor:
        if a is not None and b is not None:
            y = torch.addmm(y, torch.mm(rotated, b), a)
        if undo is not None:
            y = undo(y)
        return y if bias is None else y.add_(bias)

    return epilogue
