"""Backends: what each one can run, and which one a pack gets.

A backend prepares a layer once (repacks its weights for the device) and returns a function
(x, step) -> y. `auto` takes the fastest native backend that covers every layer, or the
emulated one where there is none; a backend asked for by name runs everything or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from omega_qvla.config.recipe import Scheme
from omega_qvla.errors import BackendError, StepError
from omega_qvla.numerics.layer import QuantizedLayer


class StepLike(Protocol):
    """The running denoising step, as `modules.step_context.Step` has it."""

    @property
    def index(self) -> int: ...

    @property
    def total(self) -> int: ...


Kernel = Callable[[Tensor, "StepLike | None"], Tensor]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can run.

    native: multiplies integers; otherwise it emulates them in floating point.
    activation_kinds, activation_bits, devices (torch device types): all it covers.
    isa: instruction sets it was built for, for information.
    group_multiple: groups of inputs that share a scale must be multiples of this.
    weight_bits: widths of the stored integers.
    two_rotations: whether it rotates before the permutation too (`duquant`).
    signed_activations: whether dynamic activation scales may be negative.
    """

    name: str
    native: bool
    activation_kinds: frozenset[str]
    activation_bits: frozenset[int]
    devices: frozenset[str]
    isa: tuple[str, ...] = ()
    group_multiple: int = 1
    weight_bits: frozenset[int] = frozenset({2, 3, 4})
    two_rotations: bool = False
    signed_activations: bool = False

    def obstacle(self, scheme: Scheme) -> str | None:
        """Why the scheme cannot run here, or None if it can."""
        if self.native and not scheme.native:
            return f"activation kind {scheme.activation.kind} does not run on integers"
        if scheme.activation.kind not in self.activation_kinds:
            return f"activation kind {scheme.activation.kind} is not supported"
        if scheme.activation.kind != "none" and scheme.activation.bits not in self.activation_bits:
            return f"{scheme.activation.bits}-bit activations are not supported"
        if scheme.weight.bits not in self.weight_bits:
            return f"{scheme.weight.bits}-bit weights are not supported"
        if scheme.rotation.kind == "duquant" and not self.two_rotations:
            return "two rotations around a permutation (duquant) are not supported"
        if scheme.activation.signed and not self.signed_activations:
            return "signed activation scales (activation.signed) are not supported"
        groups = [] if scheme.weight.group is None else [scheme.weight.group]
        if scheme.activation.kind in ("per_token_group", "per_step_group"):
            groups.append(scheme.activation.group)
        odd = [group for group in groups if group % self.group_multiple]
        if odd:
            return f"groups of {odd[0]} inputs are no multiples of {self.group_multiple}"
        return None


class Backend(Protocol):
    """One way to run quantized layers."""

    name: str

    def capabilities(self) -> Capabilities:
        """What it can run."""
        ...

    def available(self) -> tuple[bool, str]:
        """(can run on this machine, why or why not)."""
        ...

    def prepare(self, layer: QuantizedLayer, device: torch.device) -> Kernel:
        """Get a layer ready on `device`: a function (x [..., in], step) -> y [..., out]."""
        ...


# name -> (module, class), fastest first: the order in which `auto` tries the native ones.
# Modules are imported when asked for, so that a missing compiler hurts only who needs it.
_BACKENDS: dict[str, tuple[str, str]] = {
    "native": ("omega_qvla.kernels.cpu", "NativeBackend"),
    "emulated": ("omega_qvla.kernels.emulated", "EmulatedBackend"),
    "reference": ("omega_qvla.kernels.reference", "ReferenceBackend"),
}
_WITH_VARIANTS = frozenset({"native"})
_FALLBACK = "emulated"


def backend_names() -> tuple[str, ...]:
    """The names that `get_backend` knows, besides `auto` for `resolve_backend`."""
    return tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend called `name`, whether or not it can run here.

    `native:avx2` is `native` held to one instruction set, for comparisons.

    Raises:
        BackendError: no such name.
    """
    base, _, variant = name.partition(":")
    if base not in _BACKENDS or (variant and base not in _WITH_VARIANTS):
        known = ", ".join(("auto", *_BACKENDS))
        raise BackendError(f"unknown backend {name!r}; one of {known}")
    module, attribute = _BACKENDS[base]
    make = getattr(import_module(module), attribute)
    return cast(Backend, make(variant) if variant else make())


def obstacle(
    backend: Backend, layers: Iterable[QuantizedLayer], device: torch.device
) -> str | None:
    """Why `backend` cannot run these layers on `device` of this machine, or None if it can."""
    available, why = backend.available()
    if not available:
        return why
    capabilities = backend.capabilities()
    if device.type not in capabilities.devices:
        return f"it does not run on {device.type}"
    for layer in layers:
        reason = capabilities.obstacle(layer.scheme)
        if reason is not None:
            return f"layer {layer.name}: {reason}"
    return None


def resolve_backend(
    name: str = "auto",
    layers: Iterable[QuantizedLayer] = (),
    device: torch.device | str = "cpu",
) -> Backend:
    """The backend for all of `layers` on `device`; its `name` says which.

    Raises:
        BackendError: unknown name, or the backend asked for cannot run a layer.
    """
    layers, device = tuple(layers), torch.device(device)
    if name != "auto":
        backend = get_backend(name)
        reason = obstacle(backend, layers, device)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run this pack: {reason}; try 'auto'")
        return backend
    for candidate in _BACKENDS:
        backend = get_backend(candidate)
        if backend.capabilities().native and obstacle(backend, layers, device) is None:
            return backend
    backend = get_backend(_FALLBACK)
    reason = obstacle(backend, layers, device)
    if reason is not None:
        raise BackendError(f"no backend can run this pack; {_FALLBACK!r}: {reason}")
    return backend


class Stepped(Protocol):
    """A layer that may have been calibrated per denoising step."""

    @property
    def name(self) -> str: ...

    @property
    def num_steps(self) -> int | None: ...


def table_row(layer: Stepped, step: StepLike | None) -> int:
    """Which row of a static table applies: that of the running step, 0 outside the steps.

    Raises:
        StepError: the layer has a row per step and none, or another number of steps, runs.
    """
    if layer.num_steps is None:
        return 0
    if step is None:
        raise StepError(
            f"layer {layer.name} has scales per denoising step; run it inside denoising_step()"
        )
    if step.total != layer.num_steps:
        raise StepError(
            f"layer {layer.name} was calibrated for {layer.num_steps} denoising steps, not "
            f"{step.total}; sample with {layer.num_steps} steps or calibrate again"
        )
    return step.index
