"""Checkpoints to policies and back."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import CheckpointError
from omega_qvla.policies import checkpoint
from omega_qvla.policies.base import Policy
from omega_qvla.policies.files import read_json, write_json
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.sources import read_groot
from omega_qvla.policies.hub import locate
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.sources import read_pi05

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights.

    folder: where it is; layout: whose, with the prefix of its names; files: tensor -> file.
    blank: the policy with every tensor on torch's `meta` device.
    """

    folder: Path
    layout: checkpoint.Layout
    files: Mapping[str, Path]
    blank: Pi05Policy | GrootPolicy


def read_outline(
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
) -> Outline:
    """Find a checkpoint and read everything but its weights; see `load_policy`."""
    folder = locate(path, revision=revision, offline=offline, cache=cache)
    files = checkpoint.tensor_files(folder)
    layout = checkpoint.detect_layout(files, folder)
    config = read_json(folder / CONFIG)
    vocabulary = None if tokenizer is None else Path(tokenizer)
    if layout.family == "pi05":
        pi05, processor = read_pi05(folder, config, settings, vocabulary)
        with torch.device("meta"):
            model = Pi05Model(pi05)
        return Outline(folder, layout, files, Pi05Policy(model, processor))
    groot, groot_processor = read_groot(
        folder, config, settings, vocabulary, offline=offline, cache=cache
    )
    with torch.device("meta"):
        groot_model = GrootModel(groot)
    return Outline(folder, layout, files, GrootPolicy(groot_model, groot_processor))


def load_policy(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
) -> Pi05Policy | GrootPolicy:
    """Load a checkpoint; its tensors, not its config, tell the family.

    Four layouts are read: openpi's PyTorch and LeRobot's `pi05` (pi0.5), Isaac-GR00T's and
    LeRobot's `groot` (GR00T N1.5). Where `processor.json` lies beside, it says how observations
    and actions are processed; otherwise the layout's own files and rules do.

    Args:
        path: the checkpoint's directory, or `owner/name` on the Hugging Face Hub.
        device: where the network goes.
        dtype: float32, or a 16-bit type (pi0.5 then keeps norms, time and action
            projections in float32, as openpi does).
        settings: what the checkpoint does not say or says otherwise, such as `cameras`: fields
            of `Pi05Options` or `GrootOptions`.
        tokenizer: file or directory, for the layouts that come without.
        revision: branch, tag or commit on the Hub.
        offline: take what the Hub's cache has, do not ask the network.
        cache: the Hub's cache, if it is not where `huggingface_hub` has it.

    Raises:
        CheckpointError: a file is missing or broken, or tensors are missing or unknown.
        ConfigError: config.json asks for something that is not implemented.
    """
    if (Path(path) / "bundle.json").is_file():
        raise CheckpointError(
            f"{path} is a bundle, which is quantized already; give the original checkpoint"
        )
    outline = read_outline(
        path,
        settings=settings,
        tokenizer=tokenizer,
        revision=revision,
        offline=offline,
        cache=cache,
    )
    model = outline.blank.module
    checkpoint.read_weights(outline.files, outline.layout, model, torch.device(device), dtype)
    model.eval().requires_grad_(False)
    return outline.blank


def save_policy(
    policy: Policy, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a checkpoint in the family's original layout; `load_policy` reads it back.

    Every file is written atomically, the weights last. Use float32 for a policy with added
    outliers: their norms do not fit bfloat16.

    Raises:
        CheckpointError: the policy is quantized (its layers are no longer the checkpoint's).
    """
    folder = Path(path)
    precision = str(dtype).removeprefix("torch.")
    if isinstance(policy, Pi05Policy):
        layout = checkpoint.PI05
        pi05 = dataclasses.replace(policy.model.config, precision=precision)
        with torch.device("meta"):
            blank: torch.nn.Module = Pi05Model(pi05)
        config = pi05.to_dict()
    elif isinstance(policy, GrootPolicy):
        layout, groot = checkpoint.GROOT, policy.model.config
        groot = dataclasses.replace(groot, extra={**groot.extra, "torch_dtype": precision})
        with torch.device("meta"):
            blank = GrootModel(groot)
        config = groot.to_dict()
    else:
        raise CheckpointError(f"{type(policy).__name__} has no checkpoint layout")
    if set(blank.state_dict()) != set(policy.module.state_dict()):
        raise CheckpointError("the policy is quantized; only the original can be saved")
    folder.mkdir(parents=True, exist_ok=True)
    policy.processor.save(folder)
    write_json(folder / CONFIG, config)
    checkpoint.write_weights(folder, layout, policy.module, dtype)
    return folder


def source_hashes(policy: Policy) -> dict[str, str]:
    """Tensor name -> sha256 of its shape and its values rounded to bfloat16.

    The rounding makes the hash independent of the dtype that the policy was loaded with.
    Call it before layers are replaced: a quantized layer is no longer a source tensor.
    """
    return tensor_hashes(policy.module.state_dict())


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> sha256 of shape and values rounded to bfloat16, as `source_hashes` has it."""
    return {name: source_hash(tensor) for name, tensor in tensors.items()}


def source_hash(tensor: Tensor) -> str:
    """sha256 of one tensor's shape and of its values rounded to bfloat16."""
    digest = hashlib.sha256(str(list(tensor.shape)).encode())
    values = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()
