"""What a checkpoint is, without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.bundle.manifest import is_bundle, read_bundle
from omega_qvla.bundle.reader import outline
from omega_qvla.errors import BundleError, CheckpointError
from omega_qvla.policies.base import SIDES, Policy
from omega_qvla.policies.checkpoint import detect_layout, tensor_files
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.registry import read_outline

#: Family -> how people call it.
FAMILIES: Mapping[str, str] = {"pi05": "π0.5 (openpi)", "groot_n15": "GR00T N1.5 (Isaac-GR00T)"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's outline.

    policy:     without weights: its modules are on torch's `meta` device.
    image_size: edge of the images that the network sees, in pixels.
    file_bytes: of the files that hold tensors.
    """

    path: Path
    policy: Policy
    image_size: int
    file_bytes: int

    @property
    def family(self) -> str:
        """`pi05` or `groot_n15`."""
        return self.policy.family

    def parameters(self) -> dict[str, int]:
        """Side -> number of parameters."""
        counts: dict[str, int] = dict.fromkeys(SIDES, 0)
        for name, parameter in self.policy.module.named_parameters():
            counts[self.policy.side_of(name)] += parameter.numel()
        return counts

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts."""
        policy = self.policy
        return {
            "path": str(self.path),
            "family": policy.family,
            "parameters": self.parameters(),
            "file_bytes": self.file_bytes,
            "cameras": list(policy.cameras),
            "image_size": self.image_size,
            "num_steps": policy.num_steps,
            "action_horizon": policy.action_horizon,
            "action_dim": policy.action_dim,
        }


def family_of(path: Path) -> str:
    """The family of a checkpoint (by its tensors) or a bundle. Raises CheckpointError,
    BundleError."""
    if is_bundle(path):
        return read_bundle(path, verify=False).family
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give the checkpoint's directory")
    return detect_layout(tensor_files(path), path).family


def open_checkpoint(path: Path, **loading: Any) -> Checkpoint:
    """Read everything but the weights, of a checkpoint or a bundle.

    Args:
        path: of a checkpoint on the Hub, its id; `Checkpoint.path` then is where it lies here.
        loading: keyword arguments of `read_outline`.

    Raises:
        CheckpointError, ConfigError, BundleError: something is missing or impossible.
    """
    if is_bundle(path):
        if loading.get("settings") or loading.get("tokenizer"):
            raise BundleError(
                f"{path} is a bundle, which has its own settings and tokenizer: leave --settings "
                "and --tokenizer out, or bundle anew with them"
            )
        return _open_bundle(path)
    found = read_outline(path, **loading)
    files = set(found.files.values())
    size = sum(file.stat().st_size for file in files)
    return Checkpoint(found.folder, found.blank, _image_size(found.blank), size)


def _open_bundle(path: Path) -> Checkpoint:
    manifest = read_bundle(path, verify=False)
    policy = outline(path, manifest)
    return Checkpoint(path, policy, _image_size(policy), manifest.total_bytes)


def _image_size(policy: Pi05Policy | GrootPolicy) -> int:
    model = policy.model.config
    vision = model.vision if isinstance(model, Pi05Config) else model.eagle.vision
    return vision.image_size
