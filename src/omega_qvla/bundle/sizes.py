"""Bytes by part: of a bundle that is being written, or by arithmetic of one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from omega_qvla.bundle.families import BAKED, PARTS, Bundled, bake
from omega_qvla.bundle.options import BundleOptions
from omega_qvla.bundle.slim import leave_out, slim
from omega_qvla.config.recipe import Recipe
from omega_qvla.numerics.layer import QuantizedLayer, expected_tensors
from omega_qvla.pack.manifest import LayerEntry
from omega_qvla.policies.base import SIDES
from omega_qvla.policies.targets import select_targets

QUANTIZED = "quantized layers"


def part_of(name: str, family: str) -> str:
    """The part of the network that a stored tensor belongs to."""
    parts = PARTS[family]
    for prefix, part in (
        (BAKED, "baked time layers"),
        (parts.embedding, "embedding table"),
        (parts.vision, "vision tower"),
        *((prefix, "connector") for prefix in parts.connector),
    ):
        if name.startswith(prefix):
            return part
    return "everything else"


def sizes_by_part(tensors: Mapping[str, Tensor], family: str) -> dict[str, int]:
    """Part -> bytes of the tensors' data. Tensors may be on the meta device."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = part_of(name, family)
        sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    return sizes


def predict_sizes(policy: Bundled, recipe: Recipe, options: BundleOptions) -> dict[str, int]:
    """Part -> bytes that `write_bundle` would write of tensors, for any size of network.

    Args:
        policy: without weights, on the meta device, with room for one embodiment; it is
            taken apart. Tensors that stay in floating point count as the dtype of
            `options.rest`, and 2 bytes where that is `keep`.

    Raises:
        RecipeError: the recipe does not fit. BundleError: as `slim`.
    """
    layers = quantized_entries(policy, recipe)
    stored = sum(layer_bytes(entry, bias) for entry, bias in layers.values())
    baked = {} if options.bake_steps is None else bake(policy, options.bake_steps)
    slimmed = slim(policy, options, layers)
    leave_out(policy, layers)
    dtype = options.dtype or torch.bfloat16
    rest = {
        name: tensor.to(dtype) if narrows(name, tensor, slimmed.int8) else tensor
        for name, tensor in policy.module.state_dict().items()
    }
    return {QUANTIZED: stored, **sizes_by_part({**rest, **baked}, policy.family)}


def narrows(name: str, tensor: Tensor, int8: frozenset[str]) -> bool:
    """Whether `rest` decides the dtype of a tensor: not of the integers and their scales."""
    module, _, field = name.rpartition(".")
    return tensor.is_floating_point() and not (module in int8 and field == "scale")


def quantized_entries(policy: Bundled, recipe: Recipe) -> dict[str, tuple[LayerEntry, bool]]:
    """Layer name -> what a pack by `recipe` would say of it, and whether it has a bias.

    Raises:
        RecipeError: the recipe does not fit.
    """
    outside = set(policy.step_independent_linears())
    entries: dict[str, tuple[LayerEntry, bool]] = {}
    for side in SIDES:
        chosen = recipe.side(side)
        if chosen is None:
            continue
        for name, scheme in select_targets(policy, chosen, side, recipe.allow_protected):
            linear = policy.module.get_submodule(name)
            rows, width = cast(Tensor, linear.weight).shape
            inside = side == "action_head" and name not in outside
            steps = policy.num_steps if inside else None
            entry = LayerEntry(side, scheme, width, rows, steps)
            entries[name] = (entry, linear.bias is not None)
    return entries


def layer_bytes(entry: LayerEntry, bias: bool) -> int:
    """Bytes of one layer's tensors in a pack."""
    # `expected_tensors` reads of a layer only what an entry has too.
    tensors = expected_tensors(cast(QuantizedLayer, entry))
    return sum(
        torch.empty(shape, dtype=dtype, device="meta").nbytes
        for field, (shape, dtype) in tensors.items()
        if field != "bias" or bias
    )
