"""What a pack says about itself: whose layers, by which recipe, from which calibration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omega_qvla.config import Recipe, Scheme, SideRecipe
from omega_qvla.config.recipe import to_plain
from omega_qvla.errors import PackError, RecipeError
from omega_qvla.policies.base import SIDES

FORMAT_VERSION = 1


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain dicts and scalars, as `config.recipe.to_plain` has it."""
    plain: dict[str, Any] = to_plain(scheme)
    return plain


def scheme_from_dict(data: Any) -> Scheme:
    """The inverse of `scheme_to_dict`. Raises RecipeError on an unknown key or value."""
    holder = {"name": "layer", "backbone": {"scheme": data}, "action_head": None}
    side = Recipe.from_dict(holder).backbone
    assert isinstance(side, SideRecipe)
    return side.scheme


@dataclass(frozen=True)
class LayerEntry:
    """One quantized layer: num_steps is None where it runs outside the denoising steps."""

    side: str
    scheme: Scheme
    in_features: int
    out_features: int
    num_steps: int | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "scheme": scheme_to_dict(self.scheme),
            "in": self.in_features,
            "out": self.out_features,
            "num_steps": self.num_steps,
        }

    @classmethod
    def from_dict(cls, name: str, data: Any) -> LayerEntry:
        """Raises PackError naming the layer."""
        _need_keys(data, {"side", "scheme", "in", "out", "num_steps"}, f"layer {name}")
        try:
            scheme = scheme_from_dict(data["scheme"])
        except RecipeError as error:
            raise PackError(f"layer {name}: the manifest has an unknown scheme: {error}") from error
        sizes = [data["in"], data["out"], 1 if data["num_steps"] is None else data["num_steps"]]
        if data["side"] not in SIDES or not all(type(n) is int and n > 0 for n in sizes):
            raise PackError(f"layer {name}: impossible side, size or step count in the manifest")
        return cls(data["side"], scheme, data["in"], data["out"], data["num_steps"])


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: dtype as safetensors spells it, shape, sha256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}

    @classmethod
    def from_dict(cls, name: str, data: Any) -> TensorEntry:
        """Raises PackError naming the tensor."""
        _need_keys(data, {"dtype", "shape", "sha256"}, f"tensor {name}")
        dtype, shape, digest = data["dtype"], data["shape"], data["sha256"]
        words = isinstance(dtype, str) and isinstance(digest, str)
        if not words or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise PackError(f"tensor {name}: impossible dtype, shape or hash in the manifest")
        return cls(dtype, tuple(shape), digest)


@dataclass(frozen=True)
class Manifest:
    """Everything about a pack but its tensors.

    Attributes:
        family: policy family, e.g. "pi05".
        config: the policy's model configuration, for reading only.
        source: checkpoint tensor name -> sha256 of that tensor; binds the pack to a checkpoint.
        recipe: the recipe in full (`Recipe.to_dict`); of merged packs see `merge_packs`.
        calibration: provenance of the calibration (source, count, seed, token cap, samples).
        num_steps: denoising steps that the action head was calibrated for.
        software: versions of what built it.
        layers, tensors: filled in by `write_pack`.
    """

    family: str
    source: Mapping[str, str]
    recipe: Mapping[str, Any]
    num_steps: int
    config: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Canonical JSON: equal manifests give equal text.

        Raises:
            PackError: a value that JSON cannot hold (including NaN and infinities).
        """
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["layers"] = {name: entry.to_dict() for name, entry in self.layers.items()}
        plain["tensors"] = {name: entry.to_dict() for name, entry in self.tensors.items()}
        try:
            return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PackError(f"the manifest cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises PackError: another format version, an unknown or missing key."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PackError(f"the manifest is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise PackError("the manifest is not a mapping")
        check_version(data.get("format_version"))
        _need_keys(data, {f.name for f in dataclasses.fields(cls)}, "the manifest")
        for key in ("source", "recipe", "config", "calibration", "software", "layers", "tensors"):
            if not isinstance(data[key], dict):
                raise PackError(f"the manifest's {key} is not a mapping")
        if not all(isinstance(digest, str) for digest in data["source"].values()):
            raise PackError("the manifest's source holds something else than hashes")
        steps, family = data["num_steps"], data["family"]
        if type(steps) is not int or steps < 1 or not isinstance(family, str):
            raise PackError(f"the manifest has family {family!r} and {steps!r} denoising steps")
        data["layers"] = {n: LayerEntry.from_dict(n, d) for n, d in data["layers"].items()}
        data["tensors"] = {n: TensorEntry.from_dict(n, d) for n, d in data["tensors"].items()}
        return cls(**data)


def check_version(version: Any) -> None:
    """Raises PackError unless this program reads packs of format `version`."""
    if version == FORMAT_VERSION and type(version) is int:
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    mend = "upgrade omega-qvla" if newer else "rebuild the pack"
    raise PackError(
        f"pack format version {version!r}; this omega-qvla reads version {FORMAT_VERSION}: {mend}"
    )


def sha256_text(text: str) -> str:
    """sha256 of a text (UTF-8), in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _need_keys(data: Any, keys: set[str], where: str) -> None:
    if not isinstance(data, Mapping) or set(data) != keys:
        found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise PackError(f"{where}: expected exactly the keys {sorted(keys)}, found {found}")


def source_digest(source: Mapping[str, str]) -> str:
    """One sha256 for a whole checkpoint, from the sha256 of each of its tensors."""
    return sha256_text(json.dumps(dict(source), sort_keys=True, separators=(",", ":")))
