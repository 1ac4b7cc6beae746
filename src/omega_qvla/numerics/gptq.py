"""GPTQ: rounding weights column by column, each error compensated in the columns to come.

Minimises per row w of W [out, in] the output error (w - wq) H (w - wq)^T with H = X^T X / n
(Frantar et al. 2022, arXiv:2210.17323). `gptq` is the full method; `gptq_block` the published
Omega-QVLA variant, which treats every block of columns as a problem of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.config.recipe import Grid
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.qparams import check_weight, expand_groups, qrange, weight_scales
from omega_qvla.numerics.rtn import dequantize, round_weight

_DAMP_TRIES = 6  # each ten times the damping of the one before


def row_objective(weight: Tensor, wq: Tensor, hessian: Tensor) -> Tensor:
    """Output error of each row, (w - wq) H (w - wq)^T, float64 [out]; see `objective`."""
    error = weight.double() - wq.double()
    return ((error @ hessian.double()) * error).sum(1)


def objective(weight: Tensor, wq: Tensor, hessian: Tensor) -> float:
    """trace((W - Wq) H (W - Wq)^T): the mean squared output error summed over the outputs.

    weight, wq: [out, in]; hessian: [in, in] = X^T X / n. Computed in float64.
    """
    return float(row_objective(weight, wq, hessian).sum())


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular float64 U with U^T U = inverse(H + damp * mean(diag H) * I).

    Columns that no token ever reached (diag <= 0) are uncoupled, so they are just rounded.
    The damping grows tenfold, up to six times, until the factorization succeeds.

    Raises:
        NumericsError: not a symmetric positive semi-definite, finite matrix.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NumericsError("the Hessian has values that are not finite")
    h = hessian.double()
    h = (h + h.T) / 2
    factor: Tensor
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    h = h.masked_fill(dead[:, None] | dead[None, :], 0.0)
    h.diagonal().masked_fill_(dead, mean)
    applied = 0.0
    for attempt in range(_DAMP_TRIES):
        wanted = damp * 10**attempt * mean
        h.diagonal().add_(wanted - applied)
        applied = wanted
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and bool(torch.isfinite(factor).all()):
                return factor
    raise NumericsError("the Hessian is not positive semi-definite; recalibrate the layer")


def _check(weight: Tensor, hessian: Tensor) -> None:
    check_weight(weight)
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise NumericsError(
            f"Hessian {tuple(hessian.shape)} for a weight {tuple(weight.shape)}: needs [in, in]"
        )


def _round_columns(
    columns: Tensor, factor: Tensor, step: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """One block: rounds the columns [n, out] of a weight (altered) in order.

    A column is a row here, so that it is contiguous. factor: the block's [n, n] part of U;
    step [n, out]. Returns (integers, scaled errors), both [n, out].
    """
    low, high = qrange(bits)
    q, errors = torch.empty_like(columns), torch.empty_like(columns)
    pivots = factor.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        torch.div(columns[i], step[i], out=q[i]).round_().clamp_(low, high)
        torch.addcmul(columns[i], q[i], step[i], value=-1, out=errors[i]).div_(pivot)
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return q, errors


def _sweep(
    weight: Tensor, hessian: Tensor, step: Tensor, bits: int, damp: float, block: int
) -> Tensor:
    """All columns of weight [out, in] in order, in blocks: integers [out, in], same dtype."""
    factor = inverse_factor(hessian, damp).to(weight.dtype)
    columns, step = weight.T.clone(memory_format=torch.contiguous_format), step.T.contiguous()
    q = torch.empty_like(columns)
    for start in range(0, columns.shape[0], block):
        end = min(start + block, columns.shape[0])
        part = slice(start, end)
        q[part], errors = _round_columns(columns[part], factor[part, part], step[part], bits)
        columns[end:] -= factor[part, end:].T @ errors
    return q.T


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group: int | None = None,
    grid: Grid = "fine",
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    *,
    store: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Full GPTQ of weight [out, in] under hessian [in, in].

    Scales (per row, or per group of columns) are fixed before rounding, from the original
    weights: taking a group's when its turn comes, from the corrected ones, changed the error
    by about 2% either way, and would forbid `act_order`. Columns go in blocks of `block`, the
    error of each fed forward across the whole row; with `act_order` in order of decreasing
    diag(H). A row for which plain rounding has the lower objective keeps plain rounding, so
    the result is never worse than RTN.

    damp: relative to mean(diag H). store: dtype in which scales must be exact (float16 in a
    pack). Returns (q int8 [out, in], scale [out, n_groups]).

    Raises:
        NumericsError: shapes that do not fit, non-finite values, an indefinite Hessian.
    """
    _check(weight, hessian)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    scale = weight_scales(weight, bits, group, grid, store=store)
    step = expand_groups(scale, weight.shape[1], group)
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    swept = _sweep(weight[:, order], hessian[order][:, order], step[:, order], bits, damp, block)
    q = torch.empty_like(swept)
    q[:, order] = swept
    nearest = round_weight(weight, scale, bits, group)
    worse = row_objective(weight, q * step, hessian) > row_objective(
        weight, nearest * step, hessian
    )
    return torch.where(worse[:, None], nearest, q.to(torch.int8)), scale


def gptq_block(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group: int | None = 128,
    grid: Grid = "paper",
    damp: float = 0.05,
    block: int = 128,
    *,
    store: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The published GPTQ: every block of `block` columns alone, with its own sub-Hessian.

    Damping is relative to the mean diagonal of that sub-Hessian. What couples the blocks is
    ignored, and so is the guarantee of `gptq`. Within a block errors are fed forward by the
    Cholesky factor, as GPTQ has it; the published code uses rows of the plain inverse, which
    measured worse everywhere, so this stands for the recipe at its best.
    Returns (q int8 [out, in], scale [out, n_groups]).

    Raises:
        NumericsError: shapes that do not fit, non-finite values, an indefinite Hessian.
    """
    _check(weight, hessian)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    scale = weight_scales(weight, bits, group, grid, store=store)
    step = expand_groups(scale, weight.shape[1], group)
    parts = []
    for start in range(0, weight.shape[1], block):
        part = slice(start, min(start + block, weight.shape[1]))
        parts.append(_sweep(weight[:, part], hessian[part, part], step[:, part], bits, damp, block))
    return torch.cat(parts, dim=1).to(torch.int8), scale


def quantized_objective(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """`objective` of integers q [out, in] with their scales [out, n_groups] (even groups)."""
    return objective(weight, dequantize(q, scale), hessian)
