"""Rebuild the deterministic weights of a recorded case from their names.

The rule (tests/data/conformance/weight_rule.json): every parameter is drawn from its own
generator, seeded with the hash of SALT + NAME, and scaled by its kind. The case's JSON lists
name -> shape, kind, and has checksums of many tensors.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

FIRST_VALUES_TOLERANCE = 1e-5  # scalar and vector code paths of torch.randn differ by 2.2e-6
SUM_TOLERANCE = 1e-2


def make_weight(name: str, shape: list[int], kind: str, salt: str) -> Tensor:
    """One parameter, float32 [*shape]."""
    seed = int(hashlib.sha256((salt + name).encode()).hexdigest()[:8], 16)
    r = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "norm1":
        return r.mul_(0.1).add_(1)
    if kind == "norm0":
        return r.mul_(0.1)
    if kind == "bias":
        return r.mul_(0.02)
    if kind == "catweight":
        return r.div_(math.sqrt(shape[1]))
    if kind == "weight":
        return r.div_(math.sqrt(math.prod(shape[1:])))
    raise ValueError(f"{name}: unknown weight kind {kind!r}")


def check_weight(name: str, weight: Tensor, check: dict[str, Any]) -> None:
    """Compare a rebuilt parameter with the recorded checksums.

    Raises:
        ValueError: if they differ: nothing compared after that would mean anything.
    """
    flat = weight.flatten()
    first = torch.tensor(check["first4"])
    error = (flat[: len(first)] - first).abs().max().item()
    if error > FIRST_VALUES_TOLERANCE:
        raise ValueError(f"{name}: first values differ from the recorded ones by {error:.1e}")
    total = flat.sum(dtype=torch.float64).item()
    square = flat.double().square().sum().item() if flat.numel() < 1 << 27 else check["sumsq"]
    for what, value, recorded in (("sum", total, check["sum"]), ("sumsq", square, check["sumsq"])):
        if not math.isclose(value, recorded, rel_tol=1e-6, abs_tol=SUM_TOLERANCE):
            raise ValueError(f"{name}: {what} {value} differs from the recorded {recorded}")


def make_weights(meta: dict[str, Any]) -> dict[str, Tensor]:
    """All parameters that a case's JSON lists, checked.

    Raises:
        ValueError: a kind is unknown, a checksum differs, or a checksum names no weight.
    """
    salt, checks = meta["salt"], meta.get("weight_checks", {})
    weights = {}
    for name, spec in meta["weights"].items():
        weights[name] = make_weight(name, spec["shape"], spec["kind"], salt)
        if name in checks:
            check_weight(name, weights[name], checks[name])
    if unknown := sorted(set(checks) - set(weights)):
        raise ValueError(f"weight_checks name tensors that are not weights: {unknown}")
    return weights
