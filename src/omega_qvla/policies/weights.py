"""Where a network's weights are: in memory, or in the checkpoint's files until they are needed.

A network of several billion parameters is calibrated and quantized part by part: on torch's
`meta` device it takes no memory, and `loaded` gives some of its modules real weights for as
long as the body runs. Files are mapped into memory for one tensor at a time, so that pages
that were read once do not add up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.errors import CheckpointError
from omega_qvla.numerics.phases import phase
from omega_qvla.policies.checkpoint import network_names, run_dtype
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.registry import Outline, read_outline, source_hash, tensor_hashes


class Weights(Protocol):
    """The weights of one network."""

    @property
    def dtype(self) -> str:
        """What most of the network runs in, e.g. `bfloat16`."""
        ...

    def hashes(self) -> dict[str, str]:
        """Tensor name -> sha256, as `registry.source_hashes` has it."""
        ...

    def loaded(self, parts: Sequence[str]) -> AbstractContextManager[None]:
        """While the body runs, the tensors of the modules called `parts` are real."""
        ...


def main_dtype(module: nn.Module) -> str:
    """The dtype that most of a network's numbers have, e.g. `float32`."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in module.state_dict().values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.")


class ResidentWeights:
    """The weights of a network that is in memory as a whole."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def dtype(self) -> str:
        return main_dtype(self._module)

    def hashes(self) -> dict[str, str]:
        with phase("load"):
            return tensor_hashes(self._module.state_dict())

    @contextmanager
    def loaded(self, parts: Sequence[str]) -> Iterator[None]:
        yield


class StoredWeights:
    """The weights of a checkpoint, read when a part of the network needs them.

    Args:
        outline: of the checkpoint; its network is on the meta device.
        device, dtype: where and as what weights are loaded, as in `load_policy`.

    Raises:
        CheckpointError: tensors are missing, unknown, of a wrong shape or dtype.
    """

    def __init__(self, outline: Outline, device: torch.device, dtype: torch.dtype) -> None:
        self._module: nn.Module = outline.blank.module
        self._files, self._layout = outline.files, outline.layout
        self._device, self._dtype = device, dtype
        self._names = network_names(outline.files, outline.layout, self._module)
        self._stored = {name: stored for stored, name in self._names.items()}

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def hashes(self) -> dict[str, str]:
        """As `Weights.hashes`. Raises CheckpointError: tied tensors that differ."""
        found: dict[str, str] = {}
        with phase("load"):
            for stored, name in self._names.items():
                digest = source_hash(self._read(stored))
                if found.setdefault(name, digest) != digest:
                    raise CheckpointError(f"{stored} and {name} are tied but differ")
        return found

    @contextmanager
    def loaded(self, parts: Sequence[str]) -> Iterator[None]:
        """As `Weights.loaded`; what another `loaded` around this one has loaded stays."""
        taken: dict[str, Tensor] = {}
        with phase("load"):
            for name, blank in self._module.state_dict().items():
                if blank.is_meta and any(f"{name}.".startswith(f"{part}.") for part in parts):
                    kind = run_dtype(name, self._layout, self._dtype)
                    stored = self._read(self._stored[name])
                    taken[name] = stored.to(self._device, kind, copy=True)
        try:
            self._assign(taken)
            yield
        finally:
            self._assign({name: tensor.to("meta") for name, tensor in taken.items()})

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        self._module.load_state_dict(tensors, strict=False, assign=True)
        for name in tensors:
            self._module.get_parameter(name).requires_grad_(False)

    def _read(self, stored: str) -> Tensor:
        """One tensor, mapped; its pages are given back when nobody holds it any more."""
        file = self._files[stored]
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(stored)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can no longer be read: {error}") from error


def open_policy(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Pi05Policy | GrootPolicy, StoredWeights]:
    """A checkpoint as a policy without weights, and its weights in their files.

    For builds, which need one part of the network at a time; `load_policy` has it all in
    memory, which acting needs. `options` are those of `registry.read_outline`.

    Raises:
        CheckpointError: a file is missing or broken, tensors are missing or unknown; a bundle.
        ConfigError: config.json asks for something that is not implemented.
    """
    if (Path(path) / "bundle.json").is_file():
        raise CheckpointError(
            f"{path} is a bundle, which is quantized already; give the original checkpoint"
        )
    outline = read_outline(path, **options)
    outline.blank.module.eval().requires_grad_(False)
    return outline.blank, StoredWeights(outline, torch.device(device), dtype)
