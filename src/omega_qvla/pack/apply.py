"""Putting a pack into the policy that it was made from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from omega_qvla.config import Scheme, SideRecipe
from omega_qvla.errors import PackError
from omega_qvla.modules.linear import QuantLinear, replace_linears
from omega_qvla.pack.activation_bits import with_activation_bits
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.merge import differing_tensors
from omega_qvla.pack.reader import Pack, read_pack
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.registry import source_hashes
from omega_qvla.policies.targets import select_targets

#: What to do about layers that the family quantizes by default and a pack does not hold.
Missing = Literal["error", "fallback"]


@dataclass(frozen=True)
class ApplyReport:
    """What was put in place: the backend that runs it, whether on integers, and how much."""

    backend: str
    native: bool
    layers: int
    layer_bytes: int
    layer_bytes_16bit: int


def apply_pack(
    policy: Policy,
    pack: Pack | str | os.PathLike[str],
    backend: str = "auto",
    *,
    act_bits: int | None = None,
    missing: Missing = "fallback",
) -> ApplyReport:
    """Replace the linears of `policy` that `pack` holds, in place.

    Everything is checked before anything is replaced.

    Args:
        act_bits: round inputs to so many bits instead of the pack's, see
            `with_activation_bits`.
        missing: layers that the family quantizes by default and the pack does not hold:
            `fallback` leaves them as they are, `error` refuses.

    Raises:
        PackError: the file is damaged (when given a path), or made from another checkpoint
            (the tensors that differ are named), family or step count, or the policy already
            has quantized layers.
        BackendError: the backend cannot run it.
    """
    pack = pack if isinstance(pack, Pack) else read_pack(pack)
    check_source(policy, pack.manifest)
    if missing == "error":
        check_complete(policy, pack)
    layers = pack.layers if act_bits is None else with_activation_bits(pack.layers, act_bits)
    together = [site.consumers for site in policy.sites()]
    used = replace_linears(policy.module, layers, backend, together=together)
    sizes = pack.sizes()
    return ApplyReport(
        backend=used.name,
        native=used.capabilities().native,
        layers=len(pack.layers),
        layer_bytes=sizes.layer_bytes,
        layer_bytes_16bit=sizes.layer_bytes_16bit,
    )


def check_complete(policy: Policy, pack: Pack) -> None:
    """Raise PackError unless `pack` holds every layer that its family quantizes by default."""
    chosen = [select_targets(policy, SideRecipe(Scheme()), side) for side in SIDES]
    lacking = [n for selection in chosen for n in selection.names if n not in pack.layers]
    if lacking:
        raise PackError(
            f"{pack.path}: the pack lacks {len(lacking)} layer(s), first {lacking[0]}; merge the "
            "other side's pack, or let them run unquantized (missing='fallback')"
        )


def check_source(policy: Policy, manifest: Manifest) -> None:
    """Raise PackError unless a pack with this manifest was made from this very policy."""
    if policy.family != manifest.family:
        raise PackError(
            f"this is a pack of a {manifest.family} policy, the checkpoint is {policy.family}"
        )
    if any(isinstance(module, QuantLinear) for module in policy.module.modules()):
        raise PackError("the policy already has quantized layers; load its checkpoint again")
    differing = differing_tensors(manifest.source, source_hashes(policy))
    if differing:
        named = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise PackError(
            f"this pack was made from another checkpoint: {len(differing)} of "
            f"{len(manifest.source)} tensors differ: {named}; quantize this checkpoint anew"
        )
    check_steps(manifest, policy.num_steps)


def check_steps(manifest: Manifest, num_steps: int) -> None:
    """Raise PackError where a layer's static scales are for another number of steps."""
    for name, layer in manifest.layers.items():
        tabled = layer.scheme.activation.static and layer.num_steps is not None
        if tabled and layer.num_steps != num_steps:
            raise PackError(
                f"layer {name} was calibrated for {layer.num_steps} denoising steps, the policy "
                f"runs {num_steps}; quantize with num_steps={num_steps}"
            )
