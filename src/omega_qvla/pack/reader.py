"""Reading a pack: whatever is truncated, altered or foreign is named and refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omega_qvla.errors import OmegaError, PackError
from omega_qvla.numerics.layer import TENSOR_FIELDS, QuantizedLayer
from omega_qvla.pack.files import Header, hash_entries, read_header
from omega_qvla.pack.manifest import Manifest, check_version, sha256_text
from omega_qvla.pack.stored import StoredLayers
from omega_qvla.pack.writer import FORMAT_NAME

_METADATA = ("format", "format_version", "manifest", "manifest_sha256")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the quantized layers: as stored here, as 16-bit weights and biases, and the file."""

    layer_bytes: int
    layer_bytes_16bit: int
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Stored over 16-bit size of the layers; every stored tensor counts."""
        return self.layer_bytes / self.layer_bytes_16bit


@dataclass(frozen=True)
class Pack:
    """A pack at hand. Layers are mapped from the file when asked for (`pack.stored`)."""

    path: Path
    manifest: Manifest
    layers: Mapping[str, QuantizedLayer]

    def sizes(self) -> Sizes:
        """How many bytes the layers take, and took in 16 bits (bias included)."""
        stored = sum(layer.nbytes for layer in self.layers.values())
        full = sum(
            2 * layer.out_features * (layer.in_features + (layer.bias is not None))
            for layer in self.layers.values()
        )
        return Sizes(stored, full, self.path.stat().st_size)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a pack, proved unaltered; the tensors are not looked at.

    Raises:
        PackError: no such file, truncated, altered, not a pack, or of another format version.
    """
    return _read_manifest(Path(path), read_header(Path(path)))


def read_pack(path: str | os.PathLike[str], verify: bool = True) -> Pack:
    """Read a pack. With `verify`, recompute the sha256 of every tensor (one pass over the file).

    Raises:
        PackError: as `read_manifest`; a tensor is altered (named), missing, or of a shape that
            its layer cannot have.
    """
    path = Path(path)
    header = read_header(path)
    manifest = _read_manifest(path, header)
    if verify:
        check_hashes(path, header, manifest)
    tensors = load_tensors(path, header.entries)
    for name in manifest.layers:
        try:
            _layer(name, manifest, tensors)
        except PackError:
            raise
        except (OmegaError, TypeError, ValueError) as error:
            raise PackError(f"{path}: layer {name} cannot be built: {error}") from error
    if tensors:
        raise PackError(f"{path}: tensors of no layer in the manifest: {_some(tensors)}")
    layers = StoredLayers(
        path, header, tuple(manifest.layers), lambda name, found: _layer(name, manifest, found)
    )
    return Pack(path, manifest, layers)


def check_hashes(path: Path, header: Header, manifest: Manifest) -> None:
    """Raise PackError naming the tensors whose bytes are not those that were written."""
    hashes = hash_entries(path, header)
    altered = [name for name, entry in manifest.tensors.items() if hashes[name] != entry.sha256]
    if altered:
        raise PackError(
            f"{path}: altered tensor data: {_some(altered)}; copy the pack again or rebuild it"
        )


def load_tensors(
    path: Path, names: Iterable[str], error: type[OmegaError] = PackError
) -> dict[str, Tensor]:
    """Memory-map the named tensors of a safetensors file. Raises `error`."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as failure:
        raise error(f"{path}: cannot be read as safetensors: {failure}") from failure


def _read_manifest(path: Path, header: Header) -> Manifest:
    metadata = header.metadata
    if metadata.get("format") != FORMAT_NAME:
        raise PackError(f"{path}: not an omega-qvla pack (or its header is altered)")
    version = metadata.get("format_version", "")
    try:
        check_version(int(version) if version.isdigit() else version)
    except PackError as error:
        raise PackError(f"{path}: {error} (or its header is altered)") from error
    if set(metadata) != set(_METADATA):
        raise PackError(f"{path}: the header is altered: metadata keys {sorted(metadata)}")
    if sha256_text(metadata["manifest"]) != metadata["manifest_sha256"]:
        raise PackError(f"{path}: the manifest in the header is altered (sha256 differs)")
    try:
        manifest = Manifest.from_json(metadata["manifest"])
    except PackError as error:
        raise PackError(f"{path}: {error}") from error
    _check_entries(path, header, manifest)
    return manifest


def _check_entries(path: Path, header: Header, manifest: Manifest) -> None:
    for name in sorted(set(manifest.tensors) ^ set(header.entries)):
        raise PackError(f"{path}: the header is altered: tensor {name} is missing or foreign")
    for name, stored in header.entries.items():
        said = manifest.tensors[name]
        if (stored.dtype, stored.shape) != (said.dtype, said.shape):
            raise PackError(
                f"{path}: the header is altered: {name} is {stored.dtype} {stored.shape}, the "
                f"manifest says {said.dtype} {said.shape}"
            )


def _layer(name: str, manifest: Manifest, tensors: dict[str, Tensor]) -> QuantizedLayer:
    entry = manifest.layers[name]
    found = {field: tensors.pop(f"{name}.{field}", None) for field in TENSOR_FIELDS}
    qweight, weight_scale = found.pop("qweight"), found.pop("weight_scale")
    if qweight is None or weight_scale is None:
        raise PackError(f"layer {name}: the pack holds no qweight or no weight_scale for it")
    return QuantizedLayer(
        name=name,
        side=entry.side,
        in_features=entry.in_features,
        out_features=entry.out_features,
        scheme=entry.scheme,
        num_steps=entry.num_steps,
        qweight=qweight,
        weight_scale=weight_scale,
        **found,
    )


def _some(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
