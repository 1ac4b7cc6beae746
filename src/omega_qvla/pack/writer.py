"""Writing a pack: one file, whole or not at all, the same bytes for the same content."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.pack.files import (
    DTYPES,
    check_replaceable,
    tensor_sha256,
    why_not_written,
    write_tensors,
)
from omega_qvla.pack.manifest import (
    FORMAT_VERSION,
    LayerEntry,
    Manifest,
    TensorEntry,
    sha256_text,
)

FORMAT_NAME = "omega-qvla pack"


def write_pack(
    path: str | os.PathLike[str], manifest: Manifest, layers: Mapping[str, QuantizedLayer]
) -> Manifest:
    """Write `layers` and `manifest` to `path` atomically.

    The manifest's `layers` and `tensors` are filled in here; the completed one is returned.
    Layers are ordered by name, so equal content gives equal bytes whatever their order.

    Raises:
        PackError: no layers, a key that does not equal its layer's name, an unstorable dtype,
            the file cannot be written, or something else than a pack is there. Nothing is left
            at `path` then but what was there.
    """
    if not layers:
        raise PackError(f"{os.fspath(path)}: a pack needs at least one layer")
    check_replaceable(Path(path), FORMAT_NAME)
    tensors: dict[str, Tensor] = {}
    for name in sorted(layers):
        if layers[name].name != name:
            raise PackError(f"layer {layers[name].name} was filed under the name {name}")
        for field, tensor in layers[name].tensors().items():
            tensors[f"{name}.{field}"] = tensor
    complete = dataclasses.replace(
        manifest,
        format_version=FORMAT_VERSION,
        layers={name: layer_entry(layers[name]) for name in sorted(layers)},
        tensors={name: tensor_entry(name, tensor) for name, tensor in tensors.items()},
    )
    text = complete.to_json()
    metadata = {
        "format": FORMAT_NAME,
        "format_version": str(FORMAT_VERSION),
        "manifest": text,
        "manifest_sha256": sha256_text(text),
    }
    try:
        write_tensors(Path(path), tensors, metadata)
    except OSError as error:
        raise PackError(
            f"{os.fspath(path)}: cannot be written: {why_not_written(error)}"
        ) from error
    return complete


def layer_entry(layer: QuantizedLayer) -> LayerEntry:
    """What the manifest says of one layer."""
    return LayerEntry(
        layer.side, layer.scheme, layer.in_features, layer.out_features, layer.num_steps
    )


def tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """What the manifest says of one stored tensor. Raises PackError on an unstorable dtype."""
    if tensor.dtype not in DTYPES:
        raise PackError(f"{name}: dtype {tensor.dtype} cannot be stored in safetensors")
    return TensorEntry(DTYPES[tensor.dtype], tuple(tensor.shape), tensor_sha256(tensor))
