"""A checkpoint's tensors one at a time, as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from omega_qvla.policies import checkpoint


class Source:
    """Tensors by their name in the network; memory-mapped, valid while the source is open."""

    def __init__(self, names: dict[str, str], handles: dict[str, Any]) -> None:
        self._names, self._handles = names, handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._names[name]
        tensor: Tensor = self._handles[stored].get_tensor(stored)
        return tensor


@contextmanager
def open_source(
    files: Mapping[str, Path], layout: checkpoint.Layout, network: nn.Module
) -> Iterator[Source]:
    """Open the files of a checkpoint. Raises CheckpointError where they do not fit `network`."""
    names = checkpoint.stored_names(files, layout, network)
    with ExitStack() as stack:
        paths = sorted(set(files.values()))
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        yield Source(names, {stored: opened[path] for stored, path in files.items()})
