"""A checkpoint's tensors one at a time, as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.errors import CheckpointError
from omega_qvla.policies import checkpoint


class Source:
    """Tensors by their name in the network, mapped into memory for as long as they are held."""

    def __init__(self, names: dict[str, str], files: Mapping[str, Path]) -> None:
        self._names, self._files = names, files

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew for each: pages of a file that stays mapped would add up to its size.
        stored = self._names[name]
        try:
            with safe_open(self._files[stored], framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(stored)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._files[stored]} can no longer be read: {error}"
            ) from error


def open_source(files: Mapping[str, Path], layout: checkpoint.Layout, network: nn.Module) -> Source:
    """The tensors of a checkpoint. Raises CheckpointError where they do not fit `network`."""
    return Source(checkpoint.stored_names(files, layout, network), files)
