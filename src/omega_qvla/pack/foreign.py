"""Packs of modules that are no policies of ours: `quantize_` makes, `attach_pack` applies them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from omega_qvla.errors import PackError
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.merge import differing_tensors
from omega_qvla.pack.reader import Pack, read_pack
from omega_qvla.policies.foreign import StepCounter, install_layers
from omega_qvla.policies.registry import tensor_hashes

FAMILY = "foreign"


@dataclass(frozen=True)
class Attached:
    """A foreign module that runs quantized layers.

    Attributes:
        backend: name of what computes them.
        steps: counts the denoising steps; None where no layer's scales depend on them.
    """

    module: nn.Module
    layers: Mapping[str, QuantizedLayer]
    backend: str
    steps: StepCounter | None

    def inference(self) -> AbstractContextManager[None]:
        """Around one inference that does not go through the entry method."""
        return nullcontext() if self.steps is None else self.steps.inference()


def attach_pack(
    module: nn.Module, pack: Pack | str | os.PathLike[str], backend: str = "auto"
) -> Attached:
    """Put a pack that `quantize_` wrote into a fresh copy of its module, in place.

    Raises:
        PackError: the file is damaged, of one of our own policies, or of another checkpoint.
        BackendError: the backend cannot run it.
    """
    pack = pack if isinstance(pack, Pack) else read_pack(pack)
    if pack.manifest.family != FAMILY:
        raise PackError(
            f"this is a pack of a {pack.manifest.family} policy: load that with `load_policy` and "
            "use `apply_pack`"
        )
    if any(isinstance(part, QuantLinear) for part in module.modules()):
        raise PackError("the module already has quantized layers; load its checkpoint again")
    differing = differing_tensors(pack.manifest.source, module_hashes(module))
    if differing:
        raise PackError(
            f"this pack was made from other weights: {len(differing)} tensors differ, first "
            f"{differing[0]}; quantize this module anew"
        )
    return attach(module, pack.layers, pack.manifest, backend)


def attach(
    module: nn.Module, layers: Mapping[str, QuantizedLayer], manifest: Manifest, backend: str
) -> Attached:
    """Install layers and, where their scales depend on it, the counting of steps."""
    counter = None
    tabled = any(x.scheme.activation.static and x.num_steps is not None for x in layers.values())
    head = manifest.config.get("head")
    if tabled and head is not None:
        entry = str(manifest.config.get("entry"))
        counter = StepCounter(module, str(head), entry, manifest.num_steps)
    used = install_layers(module, layers, backend)
    if counter is not None:
        counter.install()
    return Attached(module, layers, used.name, counter)


def module_hashes(module: nn.Module) -> dict[str, str]:
    """Parameter name -> hash, a shared parameter under each of its names."""
    return tensor_hashes(dict(module.named_parameters(remove_duplicate=False)))
