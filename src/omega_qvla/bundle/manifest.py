"""What a bundle says about itself, and the proof that its files are those that were written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omega_qvla.bundle.options import BundleOptions
from omega_qvla.errors import BundleError
from omega_qvla.pack.manifest import sha256_text
from omega_qvla.policies.tokenizer_files import SENTENCEPIECE_MODEL, TOKENIZER_JSON

MANIFEST = "bundle.json"
PACK, REST = "pack.safetensors", "rest.safetensors"
#: Every bundle has these and a tokenizer, in one of two formats; the statistics lie where the
#: family's processor keeps them.
REQUIRED = (PACK, REST, "config.json", "processor.json")
TOKENIZERS = (TOKENIZER_JSON, SENTENCEPIECE_MODEL)
FORMAT_VERSION = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class BundleManifest:
    """The content of `bundle.json`.

    family: policy family. num_steps: denoising steps that the policy runs.
    options: how the rest is stored. embodiment: row of the per-embodiment weights that was
    kept (GR00T), or None. absent: layers left out because nothing runs them.
    parts: part of the network -> bytes. files: path in the bundle -> entry.
    source: sha256 over the hashes of all tensors of the checkpoint. software: what wrote it.
    """

    family: str
    num_steps: int
    options: BundleOptions
    embodiment: int | None
    absent: tuple[str, ...]
    parts: Mapping[str, int]
    files: Mapping[str, FileEntry]
    source: str
    software: Mapping[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> str:
        """The text of `bundle.json`, which holds its own sha256."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))
        whole = {"manifest": content, "sha256": sha256_text(_canonical(content))}
        return json.dumps(whole, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BundleManifest:
        """Raises BundleError: not a manifest, altered, or of another format version."""
        try:
            whole = json.loads(text)
            content, digest = whole["manifest"], whole["sha256"]
            version = content["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{MANIFEST} is truncated or altered: {error}") from error
        if sha256_text(_canonical(content)) != digest:
            raise BundleError(f"{MANIFEST} is altered (sha256 differs); copy the bundle again")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"bundle format version {version!r}; this omega-qvla reads {FORMAT_VERSION}: "
                "upgrade it, or bundle anew"
            )
        try:
            values = dict(content)
            values["options"] = BundleOptions.from_dict(values["options"])
            values["absent"] = tuple(values["absent"])
            values["files"] = {n: FileEntry(**e) for n, e in values["files"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} has another content than it should: {error}") from error


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a bundle's directory (whole or not)."""
    return (Path(path) / MANIFEST).is_file()


def read_bundle(path: str | os.PathLike[str], verify: bool = True) -> BundleManifest:
    """The manifest of a bundle, itself proved; with `verify`, so is every file (one pass).

    Raises:
        BundleError: naming the file that is missing, truncated or altered.
    """
    folder = Path(path)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST} cannot be read: {error}") from error
    try:
        manifest = BundleManifest.from_json(text)
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error
    _check_files(folder, manifest, verify)
    return manifest


def _check_files(folder: Path, manifest: BundleManifest, verify: bool) -> None:
    missing = sorted(set(REQUIRED) - set(manifest.files))
    if not set(TOKENIZERS) & set(manifest.files):
        missing.append(" or ".join(TOKENIZERS))
    if missing:
        raise BundleError(f"{folder}: the manifest does not list {', '.join(missing)}")
    for name, said in manifest.files.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise BundleError(f"{folder}: the manifest lists {name}, which is outside the bundle")
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise BundleError(f"{file} is missing; copy the bundle again") from error
        if size != said.bytes:
            fault = "truncated" if size < said.bytes else "altered"
            raise BundleError(
                f"{file} is {fault}: {size} bytes instead of {said.bytes}; copy the bundle again"
            )
        if verify and describe_file(file).sha256 != said.sha256:
            raise BundleError(f"{file} is altered (sha256 differs); copy the bundle again")


def describe_file(file: Path) -> FileEntry:
    """Size and sha256, read in chunks. Raises BundleError."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(file, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
    return FileEntry(size, digest.hexdigest())


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
