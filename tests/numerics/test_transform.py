"""The change of basis leaves the product alone, and is the matrix it claims to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.config.recipe import Rotation
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.duquant import greedy_rotation, shared_block
from omega_qvla.numerics.hadamard import random_signs
from omega_qvla.numerics.permutation import zigzag_permutation
from omega_qvla.numerics.rotation import build_rotation
from omega_qvla.numerics.transform import InputTransform

from .problems import layer_weight, random

KINDS = ("none", "hadamard", "svd", "svd_hadamard", "full_hadamard", "duquant")


def make(kind: str, weight: torch.Tensor, smooth: bool, permute: bool) -> InputTransform:
    width = weight.shape[1]
    first = blocks = None
    if kind == "duquant":
        first, blocks = (
            greedy_rotation(w, shared_block(width, 16), 3) for w in (weight, weight**2)
        )
    elif "svd" in kind:
        blocks = build_rotation(weight, kind, 16)  # type: ignore[arg-type]
    return InputTransform(
        Rotation(kind, block=16),  # type: ignore[arg-type]
        smooth=torch.exp(random(width, seed=9)) if smooth else None,
        permutation=zigzag_permutation(weight).to(torch.int32) if permute else None,
        blocks=blocks,
        signs=random_signs(width, 3) if kind == "full_hadamard" else None,
        first=first,
    )


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 12, 16, 48, 56, 80]),
    smooth=st.booleans(),
    permute=st.booleans(),
    seed=st.integers(0, 99),
)
def test_product_is_unchanged(
    kind: str, width: int, smooth: bool, permute: bool, seed: int
) -> None:
    weight, x = layer_weight(9, width, seed).double(), random(2, 5, width, seed=seed).double()
    transform = make(kind, weight, smooth, permute)
    expected = x @ weight.T
    y = transform.activations(x) @ transform.weight(weight).T
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    # undo_weight is the counterpart of activations, whatever the weight.
    other = random(4, width, seed=seed + 1).double()
    torch.testing.assert_close(
        transform.activations(x) @ other.T,
        x @ transform.undo_weight(other).T,
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_is_that_of_the_transformed_tokens(kind: str) -> None:
    weight, x = layer_weight(9, 48).double(), random(70, 48).double()
    transform = make(kind, weight, smooth=True, permute=True)
    rotated = transform.activations(x)
    torch.testing.assert_close(transform.hessian_(x.T @ x / 70), rotated.T @ rotated / 70)


def test_blocks_must_be_there() -> None:
    with pytest.raises(NumericsError, match="without its stored blocks"):
        InputTransform(Rotation("svd")).activations(torch.ones(1, 64))
