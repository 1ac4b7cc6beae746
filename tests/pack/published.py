"""Files of the published format, written as the published builders write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.numerics.permutation import zigzag_permutation
from omega_qvla.numerics.qparams import expand_groups, weight_scales
from omega_qvla.numerics.rotation import block_sizes, build_output_rotation, build_rotation
from omega_qvla.numerics.rtn import round_weight
from omega_qvla.policies.base import Policy

STEPS, BLOCK = 4, 16
HEAD = ("action_head.model.transformer_blocks", "gemma_expert.model.layers")
BACKBONE = ("language_model.model.layers", "language_model.layers")


def dense(blocks: Tensor, width: int) -> Tensor:
    """The block-diagonal matrix [width, width]."""
    sizes = block_sizes(width, blocks.shape[-1])
    return torch.block_diag(*[b[:n, :n] for b, n in zip(blocks, sizes, strict=True)])


def linears(policy: Policy, places: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    """The quantized layers of one side, by name."""
    endings = ("_proj", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    unused = set(policy.unused_linears())
    return {
        name: module
        for name, module in policy.module.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(place in name for place in places)
        and name.endswith(endings)
        and name not in unused
    }


def head_record(weight: Tensor, seed: int, blocks: bool, rank: int = 0) -> dict[str, Any]:
    """Permutation, both rotations, RTN, a table per step; `blocks`: as for pi0.5, too."""
    weight = weight.detach().float()
    out, width = weight.shape
    order = zigzag_permutation(weight)
    inner = build_rotation(weight[:, order], "svd_hadamard", BLOCK)
    outer = build_output_rotation(weight, BLOCK)
    rotation = torch.eye(width)[:, order] @ dense(inner, width)
    rotation_out = dense(outer, out)
    rotated = rotation_out @ (weight @ rotation)
    u, s, vh = torch.linalg.svd(rotated, full_matrices=False)
    a, b = u[:, :rank] * s[:rank].sqrt(), vh[:rank].T * s[:rank].sqrt()
    rest = rotated - a @ b.T
    scale = weight_scales(rest, 4, 128, "paper")
    q = round_weight(rest, scale, 4, 128)
    generator = torch.Generator().manual_seed(seed)
    half = torch.float16
    record: dict[str, Any] = {
        "format": "dit_svdquant_v1",
        "weight_res_q": (q * expand_groups(scale, width, 128)).to(half),
        "lowrank_A": a.to(half),
        "lowrank_B": b.to(half),
        "act_scale_table": torch.rand(STEPS, width, generator=generator) + 0.05,
        "duquant_rotation": rotation.to(half),
        "duquant_rotation_out": rotation_out.to(half),
        "weight_bits": 4,
        "a_bits": 4,
        "rank": rank,
        "act_percentile": 99.9,
        "gptq_damp_percent": 0.05,
        "q_truth": q,  # not published: what the tests compare with
    }
    if blocks:
        record["duquant_rotation_blocks"] = inner.to(half)
        record["duquant_rotation_perm"] = order
        record["duquant_rotation_out_blocks"] = outer.to(half)
    return record


def backbone_record(weight: Tensor) -> dict[str, Any]:
    """An input rotation without permutation, no activation scales."""
    weight = weight.detach().float()
    width = weight.shape[1]
    rotation = dense(build_rotation(weight, "svd_hadamard", BLOCK), width)
    rotated = weight @ rotation
    scale = weight_scales(rotated, 4, 128, "paper")
    q = round_weight(rotated, scale, 4, 128)
    return {
        "baseline_q": (q * expand_groups(scale, width, 128)).to(torch.float16),
        "weight_bits": 4,
        "n_calib_tokens": 100,
        "gptq_block_size": 128,
        "gptq_damp_percent": 0.05,
        "duquant_rotation": rotation.to(torch.float16),
        "q_truth": q,
    }


def published_content(policy: Policy, rank: int = 0) -> dict[str, Any]:
    """A merged file of both sides."""
    content: dict[str, Any] = {
        "__meta__": {"merged_from": [{"path": "x/quantized.pt", "n_records": 3}], "w_bits": 4}
    }
    for i, (name, linear) in enumerate(linears(policy, HEAD).items()):
        content[name] = head_record(linear.weight, i, policy.family == "pi05", rank)
    for name, linear in linears(policy, BACKBONE).items():
        if name not in content:
            content[name] = backbone_record(linear.weight)
    return content


def write_published(content: Any, path: Path) -> Path:
    """`torch.save`, as published."""
    torch.save(content, path)
    return path
