"""The shape of a bundled network: which layers are left out, which become 8-bit ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from omega_qvla.bundle.families import PARTS, Bundled, time_linears
from omega_qvla.bundle.options import BundleOptions
from omega_qvla.errors import BundleError
from omega_qvla.modules.int8 import Absent, Int8Embedding, Int8Linear


@dataclass(frozen=True)
class Slim:
    """What `slim` changed. absent: layers left out; int8: modules stored in 8 bits."""

    absent: tuple[str, ...]
    int8: frozenset[str]


def slim(
    policy: Bundled,
    options: BundleOptions,
    quantized: Collection[str],
    dtype: torch.dtype = torch.float32,
) -> Slim:
    """Replace, in place, what a bundle with these options does not store as it was.

    Args:
        policy: its tensors may be on the meta device.
        quantized: layers of the pack; they are left alone.
        dtype: of what an 8-bit embedding table gives out.

    Raises:
        BundleError: baking would leave out layers that the pack has quantized.
    """
    baked = time_linears(policy) if options.bake_steps is not None else ()
    clash = sorted(set(baked) & set(quantized))
    if clash:
        raise BundleError(
            f"the pack quantizes {clash[0]}, whose output baking would store; leave the time "
            "layers out of the recipe, or do without --bake-steps"
        )
    absent = (*(n for n in policy.unused_linears() if n not in quantized), *baked)
    for name in absent:
        _put(policy.module, name, Absent())
    int8 = _eight_bit(policy, options, quantized)
    for name in int8:
        _put(policy.module, name, _int8_twin(policy.module.get_submodule(name), dtype))
    return Slim(absent, frozenset(int8))


def leave_out(policy: Bundled, names: Collection[str]) -> None:
    """Take the layers `names` (a pack's) out of a network whose rest is to be looked at."""
    for name in names:
        _put(policy.module, name, Absent())


def _eight_bit(policy: Bundled, options: BundleOptions, quantized: Collection[str]) -> list[str]:
    parts = PARTS[policy.family]
    prefixes: tuple[str, ...] = ()
    if options.vision == "int8":
        prefixes += (parts.vision,)
    if options.connector == "int8":
        prefixes += parts.connector
    names = [
        name
        for name, module in policy.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and name not in quantized
    ]
    return [*names, parts.embedding] if options.embed == "int8" else names


def _int8_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            return Int8Linear(module.in_features, module.out_features, module.bias is not None)
        assert isinstance(module, nn.Embedding)
        return Int8Embedding(module.num_embeddings, module.embedding_dim, dtype)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
