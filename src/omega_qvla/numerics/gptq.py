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
from omega_qvla.numerics.factor import checked, factor_, indefinite
from omega_qvla.numerics.phases import phase
from omega_qvla.numerics.qparams import check_weight, expand_groups, qrange, weight_scales
from omega_qvla.numerics.rtn import dequantize, round_weight
from omega_qvla.numerics.symmetric import both_sides_

#: Up to this many inputs everything is computed in float64, and objectives from the Hessian
#: itself; above, in float32 within the Hessian's memory, and objectives from its factor.
EXACT_UP_TO = 1024
_PANEL = 512  # columns at once in products with the factor


def row_objective(weight: Tensor, wq: Tensor, hessian: Tensor) -> Tensor:
    """Output error of each row, (w - wq) H (w - wq)^T, float64 [out]; see `objective`."""
    error = weight.double() - wq.double()
    return ((error @ hessian.double()) * error).sum(1)


def objective(weight: Tensor, wq: Tensor, hessian: Tensor) -> float:
    """trace((W - Wq) H (W - Wq)^T): the mean squared output error summed over the outputs.

    weight, wq: [out, in]; hessian: [in, in] = X^T X / n. Computed in float64.
    """
    return float(row_objective(weight, wq, hessian).sum())


def _check(weight: Tensor, hessian: Tensor) -> None:
    check_weight(weight)
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise NumericsError(
            f"Hessian {tuple(hessian.shape)} for a weight {tuple(weight.shape)}: needs [in, in]"
        )


def _round_columns(
    columns: Tensor, original: Tensor, coupling: Tensor, step: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """One block: rounds the columns [n, out] of a weight in order, correcting those after.

    A column is a row here, so that it is contiguous. columns: what is to be rounded, corrected
    for the blocks before (altered: for this block too); original: the weight itself; coupling:
    the block's [n, n] part of M, its columns divided by their diagonal entries. Returns
    (integers, errors of the original weight), both [n, out].
    """
    low, high = qrange(bits)
    q, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(len(columns)):
        torch.div(columns[i], step[i], out=q[i]).round_().clamp_(low, high)
        torch.addcmul(original[i], q[i], step[i], value=-1, out=errors[i])
        columns[i + 1 :].addr_(coupling[i, i + 1 :], errors[i])
    return q, errors


def _sweep(
    original: Tensor, factor: Tensor, step: Tensor, bits: int, block: int
) -> tuple[Tensor, Tensor]:
    """All columns of a weight in order, in blocks; a column is a row here: original [in, out].

    factor: M with M M^T = H + lambda I in its upper triangle [in, in]; the rest is not looked
    at. step: [in, out], or [1, out]. With e = w - q s, entry j of e M is
    M_jj (w_j + sum_{i<j} e_i M_ij / M_jj - q_j s_j): rounding what is in brackets, column by
    column, is the greedy minimisation of |e M|^2 = e (H + lambda I) e^T, and is GPTQ, without
    the inverse. Returns (integers int8 [in, out], |e M|^2 float64 [out]).
    """
    pivots = factor.diagonal().clone()
    columns = original.clone()
    q = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    reached = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        part = slice(start, end)
        steps = step[part] if len(step) > 1 else step.expand(end - start, -1)
        coupling = factor[part, part] / pivots[part]
        rounded, errors = _round_columns(columns[part], original[part], coupling, steps, bits)
        q[part] = rounded
        left = torch.addcmul(columns[part], rounded, steps, value=-1).mul_(pivots[part, None])
        reached += left.square_().sum(0, dtype=torch.float64)
        for first in range(end, len(columns), _PANEL):
            after = slice(first, min(first + _PANEL, len(columns)))
            columns[after].addmm_((factor[part, after] / pivots[after]).T, errors)
    return q, reached


def _plain_is_better(error: Tensor, factor: Tensor, added: float, reached: Tensor) -> Tensor:
    """Whether e H e^T = |e M|^2 - lambda |e|^2 < reached: bool [out], errors e^T [in, out].

    The terms of |e M|^2 are not negative, so a row is decided as soon as enough of them are
    summed; the first columns are the cheapest, and often the first third is enough.
    """
    bar = reached + added * _squares(error)
    total = torch.zeros_like(bar)
    for start in range(0, len(error), _PANEL):
        part = slice(start, min(start + _PANEL, len(error)))
        product = factor[part, part].triu().T @ error[part]
        product.addmm_(factor[:start, part].T, error[:start])
        total += _squares(product)
        if bool((total >= bar).all()):
            break
    return total < bar


def _factored(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """(M, lambda) in the memory of `hessian`, or in float64 where float32 does not suffice.

    Raises:
        NumericsError: not positive semi-definite.
    """
    checked(hessian)
    if hessian.dtype != torch.float64:
        added = factor_(hessian, damp, tries=1)
        if added is not None:
            return hessian, added
        hessian = hessian.double()
    added = factor_(hessian, damp)
    if added is None:
        raise indefinite()
    return hessian, added


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
    consume: bool = False,
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Full GPTQ of weight [out, in] under hessian [in, in].

    Scales (per row, or per group of columns) are fixed before rounding, from the original
    weights: taking a group's when its turn comes, from the corrected ones, changed the error
    by about 2% either way, and would forbid `act_order`. Columns go in blocks of `block`, the
    error of each fed forward across the whole row; with `act_order` in order of decreasing
    diag(H). A row for which plain rounding has the lower objective keeps plain rounding, so
    the result is never worse than RTN (beyond `EXACT_UP_TO` inputs: up to the rounding of
    float32 products).

    damp: relative to mean(diag H). store: dtype in which scales must be exact (float16 in a
    pack). consume: the hessian may be overwritten, which saves its copy. signed: scales have the
    sign that takes the largest weight to qmin, see `weight_scales`. Returns
    (q int8 [out, in], scale [out, n_groups]).

    Raises:
        NumericsError: shapes that do not fit, non-finite values, an indefinite Hessian.
    """
    _check(weight, hessian)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    with phase("scales"):
        scale = weight_scales(weight, bits, group, grid, store=store, signed=signed)
        nearest = round_weight(weight, scale, bits, group)
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    exact = weight.shape[1] <= EXACT_UP_TO
    with phase("factorize"):
        factor, added = _factored(_ordered(hessian, order, act_order, exact, consume), damp)
        factor = factor.to(weight.dtype)
    with phase("round"):
        # Turned and in order: what follows walks along columns, which lie apart in a weight.
        turned = weight.T.contiguous()[order]
        steps = scale.T.contiguous()
        if group is not None:
            steps = expand_groups(scale, weight.shape[1], group).T[order]
        swept, reached = _sweep(turned, factor, steps, bits, block)
        q = torch.empty_like(swept)
        q[order] = swept
        q = q.T.contiguous()
        if exact:
            step = expand_groups(scale, weight.shape[1], group)
            reached = row_objective(weight, q * step, hessian)
            worse = reached > row_objective(weight, nearest * step, hessian)
        else:
            reached -= added * _squares(torch.addcmul(turned, swept, steps, value=-1))
            error = turned.addcmul_(nearest.T.contiguous()[order], steps, value=-1)
            worse = _plain_is_better(error, factor, added, reached)
    return torch.where(worse[:, None], nearest, q), scale


def _ordered(hessian: Tensor, order: Tensor, reorder: bool, exact: bool, consume: bool) -> Tensor:
    """The hessian with its channels in `order`, to be overwritten; symmetric where exact."""
    if exact:
        h = hessian.double()[order][:, order]
        return (h + h.T) / 2
    h = hessian if consume else hessian.clone()
    return both_sides_(h, lambda rows: rows[:, order]) if reorder else h


def _squares(turned: Tensor) -> Tensor:
    """Squared length of each row of a weight [out], given as [in, out]."""
    return turned.square().sum(0, dtype=torch.float64)


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
    signed: bool = False,
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
    scale = weight_scales(weight, bits, group, grid, store=store, signed=signed)
    step = expand_groups(scale, weight.shape[1], group)
    parts = []
    with phase("round"):
        for start in range(0, weight.shape[1], block):
            part = slice(start, min(start + block, weight.shape[1]))
            own = hessian[part, part].double()
            factor, _ = _factored((own + own.T) / 2, damp)
            turned, steps = weight[:, part].T.contiguous(), step[:, part].T.contiguous()
            q, _ = _sweep(turned, factor.to(weight.dtype), steps, bits, block)
            parts.append(q.T)
    return torch.cat(parts, dim=1), scale


def quantized_objective(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """`objective` of integers q [out, in] with their scales [out, n_groups] (even groups)."""
    return objective(weight, dequantize(q, scale), hessian)
