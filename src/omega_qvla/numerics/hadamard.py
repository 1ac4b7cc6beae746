"""Hadamard transforms over the last dimension: in blocks, and over the full width.

All matrices are normalized (H Hᵀ = I) and act from the right, x' = x H. A transform of width
n runs as butterfly stages, one per Kronecker factor: radix up to 64 for the power of two, and
one stage of 12, 20, 28 or 36 with a Paley matrix; never as a dense product of the whole width.
(Radix-2 stages made of additions need six passes over memory where radix 64 needs one: 5 to 10
times slower in torch, measured at widths 256 to 2048.)

Paley's constructions (R. E. A. C. Paley, "On orthogonal matrices", 1933), from the quadratic
residues of a prime q: I gives order q + 1 for q = 3 mod 4 (12, 20), II gives order 2(q + 1)
for q = 1 mod 4 (28, 36).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from omega_qvla.errors import NumericsError
from omega_qvla.numerics.checks import require_floating, require_vector

BASE_ORDERS = (1, 12, 20, 28, 36)
_MAX_RADIX_BITS = 6
_PALEY = {12: ("I", 11), 20: ("I", 19), 28: ("II", 13), 36: ("II", 17)}


def is_power_of_two(n: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return n > 0 and n & (n - 1) == 0


def split_width(n: int) -> tuple[int, int] | None:
    """Factor n = m * 2^k with m in BASE_ORDERS; None where there is no such factorization."""
    for m in BASE_ORDERS:
        if n > 0 and n % m == 0 and is_power_of_two(n // m):
            return m, n // m
    return None


def is_hadamard_width(n: int) -> bool:
    """True when a full-width transform exists here: n = 2^k * {1, 12, 20, 28, 36}."""
    return split_width(n) is not None


def block_sizes(width: int, block: int) -> tuple[int, ...]:
    """Sizes of the diagonal blocks of a `width`-wide block rotation.

    As many blocks of `block` as fit, then falling powers of two: (100, 64) -> (64, 32, 4).
    Raises NumericsError for a width below 1 or a block that is no power of two.
    """
    if width < 1:
        raise NumericsError(f"width must be at least 1, got {width}")
    if not is_power_of_two(block):
        raise NumericsError(f"block must be a power of two, got {block}")
    full, rest = divmod(width, block)
    tail = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return (block,) * full + tuple(tail)


def base_matrix(m: int) -> Tensor:
    """Hadamard matrix of order m in BASE_ORDERS, entries +1 and -1, int64 [m, m]."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if m not in _PALEY:
        raise NumericsError(f"no Hadamard matrix of order {m} here, only {BASE_ORDERS}")
    kind, q = _PALEY[m]
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)])
    index = torch.arange(q)
    border = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    border[0, 1:] = 1
    border[1:, 0] = -1 if kind == "I" else 1
    border[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    eye = torch.eye(q + 1, dtype=torch.int64)
    if kind == "I":
        return eye + border
    plus = torch.tensor([[1, 1], [1, -1]])
    minus = torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(border, plus) + torch.kron(eye, minus)


def _sylvester(n: int) -> Tensor:
    """Sylvester's matrix of order n = 2^k, entries +1 and -1, int64 [n, n]."""
    matrix = torch.ones(1, 1, dtype=torch.int64)
    pair = torch.tensor([[1, 1], [1, -1]])
    while matrix.shape[0] < n:
        matrix = torch.kron(pair, matrix)
    return matrix


def hadamard_matrix(
    n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Normalized Hadamard matrix [n, n]: H_m ⊗ Sylvester(2^k) for n = m * 2^k.

    `full_hadamard(x)` equals `x @ hadamard_matrix(n)`. Raises NumericsError for other n.
    """
    factors = split_width(n)
    if factors is None:
        raise NumericsError(_no_transform(n))
    m, power = factors
    matrix = torch.kron(base_matrix(m), _sylvester(power)).to(torch.float64)
    return matrix.mul(1.0 / math.sqrt(n)).to(device=device, dtype=dtype)


def random_signs(n: int, seed: int) -> Tensor:
    """Reproducible signs, int8 [n] of +1 and -1, drawn on the CPU."""
    if n < 1:
        raise NumericsError(f"signs need a width of at least 1, got {n}")
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8)
    return bits * 2 - 1


def _radices(power: int) -> tuple[int, ...]:
    """Split 2^k into few, nearly equal powers of two of at most 64, largest first."""
    bits = power.bit_length() - 1
    count = -(-bits // _MAX_RADIX_BITS)
    return tuple(1 << (bits + count - 1 - i) // count for i in range(count))


def _entry_bits(order: int) -> int:
    return round(math.log2(order) / 2)


@cache
def _stage(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Entries are a power of two: exact in every dtype, and sums stay in float16's range.
    # Built outside inference mode, so that the cached tensor may later meet autograd.
    with torch.inference_mode(False):
        matrix = _sylvester(order) if is_power_of_two(order) else base_matrix(order)
        return matrix.to(torch.float64).mul(0.5 ** _entry_bits(order)).to(device, dtype)


def _butterfly(x: Tensor, orders: tuple[int, ...], transpose: bool = False) -> Tensor:
    """Normalized H_1 ⊗ H_2 ⊗ ... over contiguous runs of Π orders; keeps the shape."""
    shape, inner = x.shape, math.prod(orders)
    factor = 1.0 / math.sqrt(inner)
    for order in orders:
        inner //= order
        matrix = _stage(order, x.dtype, x.device)
        if transpose:
            matrix = matrix.T
        # x (A ⊗ B) on a row seen as a matrix X is Aᵀ X B: one side per stage.
        x = x.reshape(-1, order) @ matrix if inner == 1 else matrix.T @ x.reshape(-1, order, inner)
        factor *= 2.0 ** _entry_bits(order)
    x = x.reshape(shape)
    if not orders:
        return x.clone()
    return x if math.isclose(factor, 1.0) else x * factor


def fwht(x: Tensor, block: int = 64, signs: Tensor | None = None) -> Tensor:
    """Normalized Sylvester-Hadamard transform of the last dimension, block by block.

    x [..., in] -> [..., in], same dtype; blocks as in `block_sizes`. With `signs` [in] (+-1)
    x is multiplied by them first. Without signs the transform is its own inverse.
    """
    require_floating(x, "input of fwht")
    width = x.shape[-1]
    sizes = block_sizes(width, block)
    if signs is not None:
        require_vector(signs, width, "signs")
        x = x * signs.to(x.dtype)
    if sizes[0] == sizes[-1] == block:
        return _butterfly(x, _radices(block))
    parts, start = [], 0
    full = width // block * block
    runs = ([(full, block)] if full else []) + [(s, s) for s in sizes[width // block :]]
    for run, size in runs:
        part = x[..., start : start + run]
        parts.append(_butterfly(part, _radices(size)))
        start += run
    return torch.cat(parts, dim=-1)


def fwht_t(x: Tensor, block: int = 64, signs: Tensor | None = None) -> Tensor:
    """Inverse of `fwht` with the same block and signs."""
    y = fwht(x, block)
    return y if signs is None else y * signs.to(y.dtype)


def full_hadamard(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """Full-width (randomized) Hadamard transform, x' = (x * signs) H.

    x [..., in] -> [..., in] for in = 2^k * {1, 12, 20, 28, 36}; NumericsError otherwise.
    """
    orders = _orders(x, signs)
    if signs is not None:
        x = x * signs.to(x.dtype)
    return _butterfly(x, orders)


def full_hadamard_t(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """Inverse of `full_hadamard` with the same signs, x = (x' Hᵀ) * signs."""
    orders = _orders(x, signs)
    y = _butterfly(x, orders, transpose=True)
    return y if signs is None else y * signs.to(y.dtype)


def _orders(x: Tensor, signs: Tensor | None) -> tuple[int, ...]:
    require_floating(x, "input of the full-width Hadamard transform")
    width = x.shape[-1]
    factors = split_width(width)
    if factors is None:
        raise NumericsError(_no_transform(width))
    if signs is not None:
        require_vector(signs, width, "signs")
    m, power = factors
    return ((m,) if m > 1 else ()) + _radices(power)


def _no_transform(n: int) -> str:
    return (
        f"no full-width Hadamard transform for width {n}: it must be 2^k times one of "
        f"{BASE_ORDERS}; use a block rotation (kind 'hadamard', block 64) instead"
    )
