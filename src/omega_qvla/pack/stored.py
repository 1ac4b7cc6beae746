"""A pack's layers, each mapped from the file when it is asked for and let go of after use.

Pages of a file that were read stay with a process as long as the mapping lives. With one mapping
per access, a pack that is repacked layer by layer is never in memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import TENSOR_FIELDS, QuantizedLayer
from omega_qvla.pack.files import DTYPES, Entry, Header

_TORCH = {name: dtype for dtype, name in DTYPES.items()}
Build = Callable[[str, dict[str, Tensor]], QuantizedLayer]


class StoredLayers(Mapping[str, QuantizedLayer]):
    """Layer name -> layer, from a file that was read and found good.

    Args:
        build: makes a layer of its name and tensors (by `layer.field`), which it takes out.

    Raises:
        PackError: on access, when the file is no longer the one that was read.
    """

    def __init__(self, path: Path, header: Header, names: tuple[str, ...], build: Build) -> None:
        self._path, self._header, self._names, self._build = path, header, names, build
        self._known = frozenset(names)
        self._identity = _identity(path)

    def __getitem__(self, name: str) -> QuantizedLayer:
        if name not in self._known:
            raise KeyError(name)
        try:
            same = _identity(self._path) == self._identity
            size = self._identity[-1]
            storage = torch.UntypedStorage.from_file(os.fspath(self._path), False, size)
        except (OSError, RuntimeError) as error:
            raise PackError(f"{self._path}: gone since it was read: {error}") from error
        if not same:
            raise PackError(f"{self._path}: altered since it was read; read it again")
        wanted = [f"{name}.{field}" for field in TENSOR_FIELDS]
        entries = {key: self._header.entries[key] for key in wanted if key in self._header.entries}
        start = self._header.data_start
        return self._build(name, {k: _view(storage, start, e) for k, e in entries.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _identity(path: Path) -> tuple[int, int, int, int]:
    """What another file, or another content, does not have."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _view(storage: Any, start: int, entry: Entry) -> Tensor:
    """One tensor of the file; a copy where it does not lie as its dtype wants."""
    begin, size = start + entry.begin, entry.end - entry.begin
    raw: Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, begin, (size,), (1,))
    dtype = _TORCH[entry.dtype]
    if begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)
