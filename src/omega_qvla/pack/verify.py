"""Proving a pack: everything that can be recomputed is recomputed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import QuantizedLayer, scale_faults
from omega_qvla.numerics.metrics import nmse
from omega_qvla.numerics.qparams import qrange
from omega_qvla.numerics.rotation import apply_output_rotation, block_sizes
from omega_qvla.numerics.rtn import dequantize
from omega_qvla.pack.apply import check_source
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.base import Policy

#: 4-bit rounding leaves 0.005 to 0.1 of a weight's energy; another layer's weight, over 1.
NMSE_LIMIT = 0.5
#: A rotation stored in 16 bits is orthogonal to about 1e-3.
ORTHOGONALITY_LIMIT = 5e-3


@dataclass(frozen=True)
class Check:
    """One line of the table. `layer` is None for what concerns the whole file.

    value: what was measured, where a number was (the NMSE, a ratio); `detail` in words.
    """

    layer: str | None
    what: str
    passed: bool
    detail: str = ""
    value: float | None = None


def verify_pack(
    path: str | os.PathLike[str], policy: Policy | None = None, *, strict: bool = True
) -> list[Check]:
    """Check a pack file, and its weights against `policy` (unquantized) where one is given.

    Returns the table of checks: integrity of the file, per layer that integers and stored
    tensors are possible for its scheme, and with `policy` that it is the source and how far
    (NMSE, after the layer's own change of basis) the dequantized weights are from it.

    Raises:
        PackError: the file is damaged, or (if `strict`) any check failed.
    """
    pack = read_pack(path, verify=True)
    count = len(pack.manifest.tensors)
    checks = [Check(None, "integrity", True, f"header, manifest and {count} tensors by sha256")]
    sizes = pack.sizes()
    detail = f"{sizes.layer_bytes} bytes for {sizes.layer_bytes_16bit} in 16 bits"
    checks.append(Check(None, "size", True, detail, sizes.ratio))
    for layer in pack.layers.values():
        checks += _layer_checks(layer)
    if policy is not None:
        checks.append(_source_check(policy, pack.manifest))
        for layer in pack.layers.values():
            checks.append(_weight_check(policy.module, layer))
    failed = [check for check in checks if not check.passed]
    if failed and strict:
        first = failed[0]
        where = f"layer {first.layer}: " if first.layer else ""
        raise PackError(
            f"{os.fspath(path)}: {len(failed)} of {len(checks)} checks failed; {where}"
            f"{first.what}: {first.detail}"
        )
    return checks


def dequantized_weight(layer: QuantizedLayer) -> Tensor:
    """The weight that a layer stands for, float32 [out, in], in its own rotated basis."""
    scale = layer.weight_scale.float()
    weight = dequantize(layer.integers(), scale, layer.scheme.weight.group)
    if layer.lowrank_a is not None and layer.lowrank_b is not None:
        weight = weight + layer.lowrank_a.float() @ layer.lowrank_b.float().T
    return weight


def weight_nmse(layer: QuantizedLayer, weight: Tensor) -> float:
    """|W' - W'q|^2 / |W'|^2 of the source weight [out, in], W' in the layer's basis."""
    rotated = layer.transform.weight(weight.detach().cpu().float())
    if layer.output_rotation is not None:
        rotated = apply_output_rotation(rotated, layer.output_rotation.float())
    return nmse(rotated, dequantized_weight(layer))


def _layer_checks(layer: QuantizedLayer) -> Iterator[Check]:
    if layer.scheme.weight.bits < 16:
        yield _integer_check(layer)
    faults = "; ".join(f"{name} {fault}" for name, fault in _tensor_faults(layer))
    yield Check(layer.name, "tensors", not faults, faults or "finite, shaped as the scheme needs")


def _integer_check(layer: QuantizedLayer) -> Check:
    low, high = qrange(layer.scheme.weight.bits)
    q = layer.integers()
    inside = bool((q >= low).all() and (q <= high).all())
    whole = layer.in_features % 2 == 0 or layer.scheme.weight.bits == 8
    padded = whole or bool((layer.qweight[:, -1] >> 4 == 8).all())
    passed = inside and padded
    detail = f"within [{low}, {high}]" if passed else _integer_fault(inside)
    return Check(layer.name, "integers", passed, detail)


def _integer_fault(inside: bool) -> str:
    if inside:
        return "the padding of odd rows is not zero"
    return "outside the range of the scheme's bits"


def _tensor_faults(layer: QuantizedLayer) -> Iterator[tuple[str, str]]:
    for name, tensor in layer.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield name, "is not finite"
    yield from scale_faults(layer)
    if layer.permutation is not None:
        expected = torch.arange(layer.in_features, dtype=layer.permutation.dtype)
        if not torch.equal(layer.permutation.sort().values, expected):
            yield "permutation", "is none"
    if layer.signs is not None and not bool((layer.signs.abs() == 1).all()):
        yield "signs", "are not +-1"
    widths = {"rotation": layer.in_features, "output_rotation": layer.out_features}
    if layer.first_rotation is not None:  # blocks that all columns share
        size = layer.first_rotation.shape[-1]
        widths |= {"rotation": size, "first_rotation": size}
    for name, width in widths.items():
        blocks = getattr(layer, name)
        if blocks is not None and not _orthogonal(blocks.float(), width):
            yield name, "is not orthogonal"


def _orthogonal(blocks: Tensor, width: int) -> bool:
    """Whether [n_blocks, B, B] are orthogonal; a smaller tail block is padded with zeros."""
    ideal = torch.zeros_like(blocks)
    for i, size in enumerate(block_sizes(width, blocks.shape[-1])):
        ideal[i, :size, :size] = torch.eye(size)
    gram = blocks.transpose(-1, -2) @ blocks
    return bool((gram - ideal).abs().max() < ORTHOGONALITY_LIMIT)


def _source_check(policy: Policy, manifest: Manifest) -> Check:
    try:
        check_source(policy, manifest)
    except PackError as error:
        return Check(None, "source", False, str(error))
    return Check(None, "source", True, f"{len(manifest.source)} tensors by sha256")


def _weight_check(module: nn.Module, layer: QuantizedLayer) -> Check:
    try:
        linear = module.get_submodule(layer.name)
    except AttributeError:
        return Check(layer.name, "weight", False, "the policy has no such layer")
    weight = getattr(linear, "weight", None)
    shape = (layer.out_features, layer.in_features)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        return Check(layer.name, "weight", False, f"the policy has no weight {shape} there")
    error = weight_nmse(layer, weight)
    passed = error <= NMSE_LIMIT
    detail = f"NMSE {error:.4f}" + ("" if passed else f", over {NMSE_LIMIT}: not its weight")
    return Check(layer.name, "weight", passed, detail, error)
