"""What lies between a policy's linear layers, compiled: one call where torch needs a handful.

Every function takes float32 tensors on the CPU whose last dimension is contiguous, and gives
None where its arguments are anything else (a gradient is asked for, a dtype or a layout that it
does not take, the kernels were not built): the caller then computes with torch. The results
agree with torch's to rounding of the last places. Gains, shifts and gates of a wrong width are
an error (`modulation_rows`): no caller means them.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError

_F32 = torch.float32
KINDS = {"gelu": 0, "silu": 1, "relu": 2}


@cache
def compiled() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    try:
        from omega_qvla.kernels import _native
    except ImportError:
        return None
    return _native


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors, in this state of the program."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if t.dtype != _F32 or not t.is_cpu or t.stride(-1) != 1 or (grad and t.requires_grad):
            return False
    return True


def modulation_rows(width: int, *tensors: Tensor | None) -> int | None:
    """How many rows gains, shifts and gates [width] or [T, (1,) width] have; 1 where all are None.

    None where they differ in T or do not lie row by row.

    Raises:
        NumericsError: a row is not `width` long, or there are none. The kernels read by address:
            they would read what lies behind.
    """
    count = 0
    for t in tensors:
        if t is None:
            continue
        if t.numel() == 0 or t.shape[-1] != width:
            raise NumericsError(
                f"a gain, shift or gate {list(t.shape)} does not fit rows of {width} values; "
                f"pass [{width}], or [T, {width}] for T groups of the batch"
            )
        rows = t.numel() // width
        if not t.is_contiguous() or count not in (0, rows) or (t.dim() > 1 and t.shape[0] != rows):
            return None
        count = rows
    return count or 1


def _row_stride(x: Tensor) -> int | None:
    """Floats from row to row of x [..., width] seen as a matrix; None: it cannot be seen so."""
    if x.dim() < 2:
        return x.shape[-1]
    stride, size = x.stride(-2), x.shape[-2]
    for dim in range(x.dim() - 3, -1, -1):
        if x.shape[dim] != 1 and size != 1 and x.stride(dim) != stride * size:
            return None
        if size == 1:
            stride = x.stride(dim)
        size *= x.shape[dim]
    return stride


def copied(source: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy of a tensor on the CPU, made by this thread alone: torch shares even 128 KiB among
    its own, which stay awake for milliseconds.

    Args:
        into: an earlier copy, of the same shape and dtype, to write over.
    """
    made = torch.empty_like(source) if into is None else into  # without gaps, in either case
    module = compiled()
    if module is None or made.stride() != source.stride():
        return made.copy_(source)
    module.copy(source.data_ptr(), made.data_ptr(), source.nbytes)
    return made


def joined(*parts: Tensor) -> Tensor | None:
    """Parts [B, T_i, width] behind each other, [B, sum of T_i, width]; one of them: a contiguous
    copy. Rows may be further apart than they are wide."""
    first = parts[0]
    if not fits(*parts) or any(t.dim() != 3 or t.shape[::2] != first.shape[::2] for t in parts):
        return None
    module, width = compiled(), first.shape[-1]
    if module is None:
        return None
    made = torch.empty(len(first), sum(t.shape[1] for t in parts), width)
    batch_bytes, at = 4 * made.stride(0), made.data_ptr()
    for t in parts:
        count = t.shape[1]
        for b in range(len(t) if count else 0):
            module.copy_rows(
                t.data_ptr() + 4 * b * t.stride(0), 4 * t.stride(1), at + b * batch_bytes,
                4 * width, count, 4 * width,
            )  # fmt: skip
        at += 4 * width * count
    return made


def concatenated(*parts: Tensor) -> Tensor:
    """`joined`, by torch where the kernel does not take them."""
    done = joined(*parts)
    return torch.cat(parts, dim=1) if done is None else done


def rms_norm(
    x: Tensor, eps: float, gain: Tensor, shift: Tensor | None = None, plus: float = 0.0
) -> Tensor | None:
    """x / rms(x) * (plus + gain) + shift over the last dimension.

    Args:
        x: [B, ..., width].
        gain, shift: [width], or [T, (1,) width] with B a multiple of T.

    Raises:
        NumericsError: a gain or shift of another width.
    """
    return _norm(x, eps, gain, shift, plus, center=False)


def layer_norm(
    x: Tensor,
    eps: float,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    plus: float = 1.0,
) -> Tensor | None:
    """(x - mean) / std * (plus + gain) + shift; arguments as for `rms_norm`."""
    return _norm(x, eps, gain, shift, plus, center=True)


def _norm(
    x: Tensor, eps: float, gain: Tensor | None, shift: Tensor | None, plus: float, *, center: bool
) -> Tensor | None:
    module = compiled()
    if module is None or not fits(x, gain, shift):
        return None
    width = x.shape[-1]
    rows = modulation_rows(width, gain, shift)
    if rows is None or x.dim() < 2 or x.numel() == 0 or (gain is None and shift is not None):
        return None
    # [.., heads, width]: heads lie side by side in a token, tokens may be further apart.
    heads = x.dim() == 4 and x.stride(2) == width
    inner = x.shape[2] if heads else 1
    stride = _row_stride(x[:, :, 0] if heads else x)
    if stride is None or x.shape[0] % rows:
        return None
    y = torch.empty(x.shape)
    outer = x.numel() // (width * inner)
    module.norm(
        x.data_ptr(), outer, stride, inner, width, _address(gain), _address(shift),
        max(1, outer // rows), plus, eps, center, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def residual(x: Tensor, add: Tensor, gate: Tensor | None = None) -> Tensor | None:
    """x + add * gate, or x + add; x and add [B, S, width], gate [T, 1, width], B a multiple of T.

    Raises:
        NumericsError: a gate of another width.
    """
    module = compiled()
    if module is None or not fits(x, add, gate) or x.shape != add.shape:
        return None
    if not (x.is_contiguous() and add.is_contiguous()):
        return None
    width = x.shape[-1]
    gates = modulation_rows(width, gate)
    if gates is None or x.shape[0] % gates:
        return None
    y = torch.empty(x.shape)
    rows = x.numel() // width
    module.residual(
        x.data_ptr(), add.data_ptr(), _address(gate), rows, max(1, rows // gates), width,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated(
    kind: Literal["gelu", "silu", "relu"], gate: Tensor, up: Tensor | None = None
) -> Tensor | None:
    """f(gate) * up, or f(gate) alone; f: GELU (tanh approximation), SiLU or ReLU."""
    module = compiled()
    if module is None or not fits(gate, up):
        return None
    stride = _row_stride(gate)
    up_stride = 0 if up is None else _row_stride(up)
    if stride is None or up_stride is None or (up is not None and up.shape != gate.shape):
        return None
    y = torch.empty(gate.shape)
    width = gate.shape[-1]
    module.gate(
        gate.data_ptr(), 0 if up is None else up.data_ptr(), y.numel() // max(1, width), stride,
        up_stride, width, KINDS[kind], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Rotary embedding, halves paired.

    Args:
        x: [B, S, heads, dim].
        cos, sin: contiguous, rows of dim / 2: one per token of the batch, or of one sequence.
    """
    module = compiled()
    dim = x.shape[-1]
    if module is None or dim < 2 or dim % 2 or not fits(x, cos, sin) or x.stride(2) != dim:
        return None
    stride = _row_stride(x[:, :, 0])
    table, tokens = cos.numel() // (dim // 2), x.shape[0] * x.shape[1]
    contiguous = cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape
    if stride is None or not contiguous or table not in (tokens, x.shape[1]):
        return None
    y = torch.empty(x.shape)
    module.rotate(
        x.data_ptr(), tokens, stride, x.shape[2], dim, cos.data_ptr(), sin.data_ptr(), table,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def attend(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    more: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
    causal: bool = False,
    exact: bool = True,
) -> Tensor | None:
    """softmax(scale q k^T) v, heads side by side: [B, Q, heads * dim].

    Args:
        q: [B, heads, Q, dim].
        keys: k and v, [B / R, kv_heads, L, dim]; R consecutive entries of q share one of them.
        more: a second run of keys and values behind the first, with the same rules.
        causal: query i sees keys 0..i of the last run, and all of the one before it.
        exact: in float32. Else long runs of keys may be met by whole numbers of 16 bits
            (csrc/attend_shorts.inl): the error is some 1e-4 of the values, that of bfloat16, in
            which the originals attend, 4e-3.
    """
    module = compiled()
    if module is None or not fits(q, *keys, *(more or ())):
        return None
    batch, heads, rows, dim = q.shape
    sources = []
    for k, v in (keys,) if more is None else (keys, more):
        if k.shape != v.shape or k.shape[-1] != dim or 0 in k.shape or batch % k.shape[0]:
            return None
        repeats = batch // k.shape[0]
        sources.append(
            (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], k.shape[2], repeats)
        )
    kv_heads = keys[0].shape[1]
    if heads % kv_heads or (more is not None and more[0].shape[1] != kv_heads):
        return None
    out = torch.empty(batch, rows, heads * dim)
    module.attend(
        (q.data_ptr(), *q.stride()[:3]), batch, heads, kv_heads, rows, dim, sources[0],
        sources[1] if more is not None else None, scale, causal, exact,
        out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
