"""The triangular factor of a damped Hessian, in the Hessian's own memory.

GPTQ rounds columns 1, 2, ... in turn, so it needs H + lambda I = M M^T with M *upper*
triangular: column j of M then couples j with the columns before it only. (The factor of the
inverse that GPTQ is usually written with is U = M^-1; M itself does, see `gptq`.) M is the
Cholesky factor of the matrix turned upside down. It is computed from the last columns to the
first in blocks, nearly all of it as matrix products: n^3 / 3 multiplications, no second copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.symmetric import all_finite, mirror_

_DAMP_TRIES = 6  # each ten times the damping of the one before
_BLOCK = 512


def factor_(hessian: Tensor, damp: float, tries: int = _DAMP_TRIES) -> float | None:
    """Overwrite the upper triangle of a symmetric `hessian` [n, n] with M.

    M M^T = H + lambda I, lambda = damp * mean(diag H). Columns that no token ever reached
    (diag <= 0) are uncoupled and get the mean, so they are just rounded. lambda grows tenfold,
    up to `tries` times in all, until the factorization succeeds. Below the diagonal the
    hessian is left as it was; that is what the next try starts from.

    Returns lambda, or None if no try succeeded (the hessian is whole again then, but for the
    columns never reached).
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean()) if bool((~dead).any()) else 1.0
    if bool(dead.any()):
        hessian[dead] = 0.0
        hessian[:, dead] = 0.0
        diagonal[dead] = mean
    for attempt in range(tries):
        added = damp * 10.0**attempt * mean
        hessian.diagonal().copy_(diagonal + added)
        if _factor(hessian):
            return added
        mirror_(hessian, to="upper")
        hessian.diagonal().copy_(diagonal)
    return None


def factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """`factor_` of a copy: (M upper triangular, lambda), in the hessian's dtype.

    Raises:
        NumericsError: not finite, or not positive semi-definite.
    """
    copy = hessian.clone()
    added = factor_(checked(copy), damp)
    if added is None:
        raise indefinite()
    return copy.triu_(), added


def checked(hessian: Tensor) -> Tensor:
    """The hessian itself. Raises NumericsError where it is not finite."""
    if not all_finite(hessian):
        raise NumericsError("the Hessian has values that are not finite")
    return hessian


def indefinite() -> NumericsError:
    """What to raise for a Hessian that no damping makes positive definite."""
    return NumericsError("the Hessian is not positive semi-definite; recalibrate the layer")


def _factor(h: Tensor) -> bool:
    """One try; whether it succeeded. Left-looking, from the last block of columns."""
    for end in range(len(h), 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        right, above = h[start:end, end:], h[:start, start:end]
        square = h[start:end, start:end]
        turned = square.triu() + square.triu(1).T
        turned = (turned - right @ right.T).flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(turned)
        if int(info) != 0 or not bool(torch.isfinite(lower).all()):
            return False
        upper = lower.flip(0, 1)
        square.copy_(square.tril(-1) + upper)
        if start:
            above.addmm_(h[:start, end:], right.T, alpha=-1)
            above.copy_(torch.linalg.solve_triangular(upper.T, above, upper=False, left=False))
    return True
