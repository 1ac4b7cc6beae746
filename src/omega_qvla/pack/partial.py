"""Unfinished work of a build: one small checked file per finished layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omega_qvla.errors import PackError
from omega_qvla.files import atomic_file
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.pack.files import why_not_written
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.writer import write_pack

_BINDING = "build.json"


class PartialBuild:
    """The directory `<out>.partial`, bound to the build that it belongs to.

    Args:
        out: the pack to be, on which the caller has the `output_lock`.
        manifest: of that pack; its small fields go into each layer's file.
        names: all layers, in order; a layer's place in it names its file.
    """

    def __init__(self, out: Path, manifest: Manifest, names: Sequence[str]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._manifest = dataclasses.replace(
            manifest, source={}, recipe={}, calibration={}, config={}
        )
        self._files = {
            name: self.path / f"layer-{i:05d}.safetensors" for i, name in enumerate(names)
        }

    def open(self, binding: Mapping[str, Any], resume: bool) -> None:
        """Make the directory, or go on with it if `resume` and it belongs to this `binding`.

        Raises:
            PackError: it belongs to another build (what differs is named), or cannot be made.
        """
        text = json.dumps(binding, sort_keys=True, indent=1)
        file = self.path / _BINDING
        try:
            if resume and file.exists():
                self._check(json.loads(file.read_text()), json.loads(text))
                return
            self.remove()  # layers without a binding could be anybody's
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as handle:
                handle.write(text.encode())
        except ValueError as error:
            raise PackError(f"{file}: unreadable ({error}); delete {self.path}") from error
        except OSError as error:
            raise PackError(f"{self.path}: cannot be written: {why_not_written(error)}") from error

    def _check(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        keys = sorted(set(found) | set(expected))
        differing = [key for key in keys if found.get(key) != expected.get(key)]
        if differing:
            raise PackError(
                f"{self.path} holds unfinished work of another build ({', '.join(differing)} "
                "differ); delete that directory, build without resuming (--no-resume), or write "
                "elsewhere"
            )

    def finished(self, name: str) -> bool:
        """Whether that layer is done."""
        return self._files[name].exists()

    def save(self, layer: QuantizedLayer) -> None:
        """Keep a finished layer."""
        write_pack(self._files[layer.name], self._manifest, {layer.name: layer})

    def layers(self, names: Sequence[str] | None = None) -> dict[str, QuantizedLayer]:
        """Finished layers by name (default: all). Raises PackError if a file is damaged or
        holds another layer."""
        result = {}
        for name in self._files if names is None else names:
            path = self._files[name]
            found = read_pack(path).layers
            if set(found) != {name}:
                raise PackError(f"{path}: holds another layer than {name}; delete {self.path}")
            result[name] = found[name]
        return result

    def remove(self) -> None:
        """Delete what was kept (the binding last), and the directory if nothing else is in it."""
        for file in (*self.path.glob("layer-*"), *self.path.glob(".*.tmp")):
            file.unlink()
        (self.path / _BINDING).unlink(missing_ok=True)
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()
