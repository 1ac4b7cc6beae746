"""A safetensors file that is written atomically, deterministically, and can be proved whole.

The container is plain safetensors (any reader opens it): an 8-byte length, a JSON header, the
data. Two things are added. The header is *canonical* (sorted keys, no spaces but the final
padding), so equal content gives equal bytes and a header that was touched in any byte, even in
one that means the same, is seen. And the file appears under its name only once it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import OmegaError, PackError
from omega_qvla.files import atomic_file

DTYPES: Mapping[torch.dtype, str] = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors format itself
_CHUNK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, limit of a file's size


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype as safetensors spells it, byte range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors header says; `data_start` is the file offset of the data section."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    data_start: int


def why_not_written(error: OSError) -> str:
    """The reason in words; of a full disk also what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return f"{reason}; make room there and call again, what is finished is kept"
    return reason


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, C order, little endian, without a copy where it is on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the raw bytes of a tensor, in hex."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; equal arguments give equal bytes.

    Raises:
        PackError: a tensor has a dtype that the format does not know.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise PackError(f"{name}: dtype {tensor.dtype} cannot be stored in safetensors")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = _canonical(header)
    with atomic_file(path) as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def _canonical(header: Mapping[str, Any]) -> bytes:
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii")
    return raw + b" " * (-len(raw) % 8)


def read_header(path: Path, error: type[OmegaError] = PackError) -> Header:
    """Read and check the header of a file that `write_tensors` wrote.

    Raises:
        error: missing, truncated, or altered in the length field or the header.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if 8 + length <= size and length <= _HEADER_LIMIT else None
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from failure
    if size < 8 or raw is None:
        raise error(
            f"{path}: {size} bytes, but its length field announces a header of {length}: the "
            "file is truncated or its length field is altered"
        )
    header = _parse(path, raw, error)
    metadata = header.pop("__metadata__", None)
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not isinstance(metadata, dict) or not strings:
        raise error(f"{path}: the header has no metadata: altered, or not written by omega-qvla")
    entries = _entries(path, header, error)
    end = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size != end:
        fault = "truncated" if size < end else "followed by foreign bytes"
        raise error(f"{path}: {size} bytes where its header announces {end}: the file is {fault}")
    return Header(metadata, entries, 8 + length)


def _parse(path: Path, raw: bytes, error: type[OmegaError]) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("ascii"))
        canonical = _canonical(header) if isinstance(header, dict) else b""
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: the header is altered or its length field is: {failure}") from failure
    if canonical != raw:
        raise error(f"{path}: the header is altered, or was not written by omega-qvla")
    return dict(header)


def _entries(path: Path, header: Mapping[str, Any], error: type[OmegaError]) -> dict[str, Entry]:
    entries = {}
    for name, item in header.items():
        try:
            begin, end = item["data_offsets"]
            entry = Entry(item["dtype"], tuple(item["shape"]), begin, end)
            fits = prod(entry.shape) * _SIZES[entry.dtype] == end - begin and len(item) == 3
        except (KeyError, TypeError, ValueError) as failure:
            raise error(f"{path}: the header entry of {name} is altered") from failure
        if not fits:
            raise error(f"{path}: the header entry of {name} is altered: shape and size disagree")
        entries[name] = entry
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].begin):
        if entry.begin != offset:
            raise error(f"{path}: the header entry of {name} is altered: its data do not adjoin")
        offset = entry.end
    return entries


def check_replaceable(path: Path, format_name: str, error: type[OmegaError] = PackError) -> None:
    """Raise `error` where writing to `path` would replace anything but a file of that format.

    A path that was mistyped may be a checkpoint's.
    """
    if not os.path.lexists(path):
        return
    found = None
    with suppress(error):
        found = read_header(path, error).metadata.get("format") if path.is_file() else None
    if found != format_name:
        raise error(
            f"{path} exists and is no {format_name}: it is left alone; remove it, or choose "
            "another output"
        )


def hash_entries(path: Path, header: Header) -> dict[str, str]:
    """sha256 of the bytes of every tensor of a file, read in chunks (never all in memory)."""
    hashes = {}
    with open(path, "rb") as file:
        for name, entry in header.entries.items():
            digest = hashlib.sha256()
            file.seek(header.data_start + entry.begin)
            left = entry.end - entry.begin
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:  # shrunk under our hands; the digest will not match
                    break
                digest.update(chunk)
                left -= len(chunk)
            hashes[name] = digest.hexdigest()
    return hashes
