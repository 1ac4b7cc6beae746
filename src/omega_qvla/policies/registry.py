"""Checkpoints to policies and back."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from omega_qvla.errors import CheckpointError
from omega_qvla.policies import checkpoint
from omega_qvla.policies.base import Policy
from omega_qvla.policies.files import read_json, write_json
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor

CONFIG = "config.json"


def load_policy(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pi05Policy | GrootPolicy:
    """Load a checkpoint; its tensors, not its config, tell the family.

    Args:
        path: a directory in openpi's (pi0.5) or Isaac-GR00T's (N1.5) layout, with
            `processor.json` and `tokenizer.json` beside.
        device: where the network goes.
        dtype: float32, or a 16-bit type (pi0.5 then keeps norms, time and action
            projections in float32, as openpi does).

    Raises:
        CheckpointError: a file is missing or broken, or tensors are missing or unknown.
        ConfigError: config.json asks for something that is not implemented.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory: give the checkpoint's directory")
    if (folder / "bundle.json").is_file():
        raise CheckpointError(
            f"{folder} is a bundle, which is quantized already; give the original checkpoint"
        )
    files = checkpoint.tensor_files(folder)
    layout = checkpoint.detect_layout(files, folder)
    config, target = read_json(folder / CONFIG), torch.device(device)
    if layout.family == "pi05":
        pi05 = Pi05Config.from_dict(config)
        processor = Pi05Processor.load(folder, pi05)
        with torch.device("meta"):
            model = Pi05Model(pi05)
        checkpoint.read_weights(files, layout, model, target, dtype)
        return Pi05Policy(model.eval().requires_grad_(False), processor)
    groot = GrootConfig.from_dict(config)
    groot_processor = GrootProcessor.load(folder, groot)
    with torch.device("meta"):
        groot_model = GrootModel(groot)
    checkpoint.read_weights(files, layout, groot_model, target, dtype)
    return GrootPolicy(groot_model.eval().requires_grad_(False), groot_processor)


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
