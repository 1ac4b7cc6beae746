"""Packs of the published Omega-QVLA code (`quantized.pt`), converted to ours.

Such a file is a pickled dictionary, layer name -> record, beside `__meta__`. A record holds
the dequantized weight (`baseline_q`, or `weight_res_q` beside `lowrank_A/B`), in the basis of
`duquant_rotation` (dense, or as `_blocks` and `_perm`) and `duquant_rotation_out`, and the
`act_scale_table` of the action head. Only tensors and plain values are unpickled: no code.

Integers are recovered exactly (`numerics.recovery`); scales to the 16 bits of a pack.
What has no counterpart here is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import omega_qvla
from omega_qvla.config import ActivationScheme, Recipe, Rotation, Scheme, SideRecipe, WeightScheme
from omega_qvla.errors import NumericsError, OmegaError, PackError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.packing import pack_int4
from omega_qvla.numerics.recovery import recover_grid
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.rotations import input_rotation, output_rotation
from omega_qvla.pack.verify import NMSE_LIMIT, weight_nmse
from omega_qvla.pack.writer import write_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.registry import source_hashes

META = "__meta__"
_WEIGHTS = ("weight_res_q", "baseline_q")
_LOWRANK_FORMAT = "dit_svdquant_v1"  # only these records' low-rank part is run by that code
_SMALLEST_SCALE = 1e-8  # what that code raises a table's zeros to
_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Published:
    """A published file: records by layer name, and what it says about itself."""

    path: Path
    records: Mapping[str, Mapping[str, Any]]
    meta: Mapping[str, Any]


def read_published(path: str | os.PathLike[str]) -> Published:
    """Read a `quantized.pt` without running anything that is in it.

    Raises:
        PackError: no such file, damaged, not a dictionary of records, or it holds objects
            (which could run code) instead of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise PackError(f"{path}: no such file; give the published `quantized.pt`")
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise PackError(
            f"{path}: refused: it is no pickle of tensors and plain values alone, and anything "
            f"else could run code: {reason}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError) as error:
        raise PackError(f"{path}: damaged, or not written by torch.save: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PackError(f"{path}: not a published pack: no dictionary of layers by name")
    meta = content.pop(META, {})
    if not content or not all(isinstance(record, dict) for record in content.values()):
        raise PackError(f"{path}: not a published pack: no record of a layer, or not only those")
    return Published(path, content, meta if isinstance(meta, dict) else {})


def convert_published(
    source: Published | str | os.PathLike[str],
    policy: Policy,
    out: str | os.PathLike[str],
    *,
    activation: ActivationScheme | None = None,
) -> Manifest:
    """Write the pack `out` of a published file that was built from `policy`'s checkpoint.

    Biases, which the file does not hold, and the hashes of the source come from the policy,
    whose weights also prove that the file is its own.

    Args:
        activation: of layers without `act_scale_table`: the published runtime measures theirs
            on its first batches and keeps them in no file. Dynamic kinds, or `none`.

    Raises:
        PackError: naming the layer and what cannot be recovered or does not fit the policy.
    """
    published = source if isinstance(source, Published) else read_published(source)
    if activation is not None and activation.static:
        raise PackError(f"activation {activation.kind} needs a table, and the file holds none")
    layers = {}
    for name in sorted(published.records):
        try:
            layers[name] = _layer(name, published, policy, activation)
        except PackError:
            raise
        except OmegaError as error:
            raise PackError(f"{published.path}: layer {name}: {error}") from error
        except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
            raise PackError(
                f"{published.path}: layer {name}: a malformed record: {error!r}"
            ) from error
    steps = {layer.num_steps for layer in layers.values() if layer.num_steps is not None}
    if len(steps) > 1:
        raise PackError(f"{published.path}: tables of {sorted(steps)} denoising steps; one of them")
    manifest = Manifest(
        family=policy.family,
        source=source_hashes(policy),
        recipe=_recipe(layers).to_dict(),
        num_steps=next(iter(steps), policy.num_steps),
        calibration=_origin(published),
        software={"omega_qvla": omega_qvla.__version__, "torch": torch.__version__},
    )
    return write_pack(out, manifest, layers)


def _layer(
    name: str, published: Published, policy: Policy, activation: ActivationScheme | None
) -> QuantizedLayer:
    record = published.records[name]
    linear = _linear(policy, name)
    stored = _weight(record)
    if tuple(stored.shape) != (linear.out_features, linear.in_features):
        raise PackError(
            f"layer {name}: {tuple(stored.shape)} in {published.path}, the checkpoint has "
            f"{(linear.out_features, linear.in_features)}: it is of another policy"
        )
    smooth = record.get("smooth_scale")
    if smooth is not None and not bool((torch.as_tensor(smooth) == 1).all()):
        raise NumericsError("`smooth_scale` divides the rotated input; a pack divides before it")
    bits = int(record.get("weight_bits", published.meta.get("weight_bits", 4)))
    if bits > 4:
        raise NumericsError(f"weight.bits {bits}: published packs hold integers of up to 4 bits")
    q, scale, group = _integers(stored, bits, _recorded_group(record, published.meta))
    permutation, rotation = input_rotation(record, linear.in_features)
    undo = output_rotation(record, linear.out_features)
    permutation, rotation, undo, block = _common_block(permutation, rotation, undo)
    a, b = _low_rank(record)
    side = policy.side_of(name)
    inside = side == "action_head" and name not in policy.step_independent_linears()
    table = _table(record, linear.in_features, inside)
    mode = str(published.meta.get("duquant_rot_mode") or published.meta.get("rot_mode"))
    scheme = Scheme(
        rotation=_rotation(rotation, block, mode),
        weight=WeightScheme(
            bits=bits,
            group=group,
            method="gptq_block" if "baseline_q" in record else "rtn",
            grid="paper",
            damp=float(record.get("gptq_damp_percent", 0.05)) or 0.05,
            block=group,
            rank=0 if a is None else a.shape[1],
        ),
        activation=_activation(record, published.meta, table, activation),
        permutation=permutation is not None,
        output_rotation=undo is not None,
    )
    tabled = scheme.activation.static
    layer = QuantizedLayer(
        name=name,
        side=side,
        in_features=linear.in_features,
        out_features=linear.out_features,
        scheme=scheme,
        num_steps=len(table) if tabled and inside and table is not None else _steps(policy, inside),
        qweight=pack_int4(q),
        weight_scale=scale.to(torch.float16),
        bias=None if linear.bias is None else linear.bias.detach().float().cpu(),
        permutation=permutation,
        rotation=rotation,
        output_rotation=undo,
        act_scale=table if tabled else None,
        lowrank_a=a,
        lowrank_b=b,
    )
    error = weight_nmse(layer, linear.weight)
    if error > NMSE_LIMIT:
        raise PackError(
            f"layer {name}: its weight is not the checkpoint's (NMSE {error:.2f}); "
            f"{published.path} was built from another one"
        )
    return layer


def _linear(policy: Policy, name: str) -> nn.Linear:
    try:
        linear = policy.module.get_submodule(name)
    except AttributeError as error:
        raise PackError(f"the checkpoint has no layer {name}: the pack is of another") from error
    if not isinstance(linear, nn.Linear):
        raise PackError(f"layer {name} is a {type(linear).__name__}, not a plain nn.Linear")
    return linear


def _weight(record: Mapping[str, Any]) -> Tensor:
    for key in _WEIGHTS:
        value = record.get(key)
        if isinstance(value, Tensor):
            return value.detach()
    raise NumericsError(f"the record holds none of {', '.join(_WEIGHTS)}, only {sorted(record)}")


def _recorded_group(record: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    return int(record.get("gptq_block_size", meta.get("gptq_block_size", _GROUPS[0])))


def _integers(stored: Tensor, bits: int, recorded: int) -> tuple[Tensor, Tensor, int]:
    """(q, scale, group): groups may have been finer than the recorded GPTQ block."""
    failure: NumericsError | None = None
    for group in dict.fromkeys((recorded, *_GROUPS)):
        try:
            q, scale = recover_grid(stored, bits, group)
        except NumericsError as error:
            failure = failure or error
            continue
        if bool((scale.to(torch.float16) <= 0).any() | scale.to(torch.float16).isinf().any()):
            raise NumericsError("a weight scale does not fit in 16 bits")
        return q, scale, group
    raise NumericsError(f"its integers cannot be recovered: {failure}") from failure


def _common_block(
    permutation: Tensor | None, rotation: Tensor | None, undo: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    blocks = {int(r.shape[-1]) for r in (rotation, undo) if r is not None}
    if len(blocks) > 1:
        raise NumericsError(f"input and output rotations of {sorted(blocks)}; a pack has one block")
    return permutation, rotation, undo, next(iter(blocks), 64)


def _rotation(blocks: Tensor | None, block: int, mode: str) -> Rotation:
    if blocks is None:
        return Rotation("none", block)
    return Rotation("svd" if mode == "svd" else "svd_hadamard", block)


def _low_rank(record: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    a, b = record.get("lowrank_A"), record.get("lowrank_B")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape[-1] == 0:
        return None, None
    if record.get("format") != _LOWRANK_FORMAT:
        raise NumericsError(f"a low-rank part in format {record.get('format')!r}, not run by it")
    return a.to(torch.float16), b.to(torch.float16)


def _table(record: Mapping[str, Any], width: int, inside: bool) -> Tensor | None:
    """The activation scales f32 [steps, in], or [1, in] outside the denoising steps."""
    value = record.get("act_scale_table")
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != width:
        raise NumericsError(f"act_scale_table is not [steps, {width}]")
    table = value.detach().float()
    seen = (table != 0).any(1)
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()) or not bool(seen.any()):
        raise NumericsError("act_scale_table is not finite and positive")
    if not inside:  # recorded once per step, from the same input, or in the first row alone
        return table[seen].mean(0, keepdim=True).clamp_min(_SMALLEST_SCALE)
    if not bool(seen.all()):
        missing = ", ".join(str(int(i)) for i in (~seen).nonzero())
        raise NumericsError(f"denoising step(s) {missing} were never calibrated: rows of zeros")
    return table.clamp_min(_SMALLEST_SCALE)


def _activation(
    record: Mapping[str, Any],
    meta: Mapping[str, Any],
    table: Tensor | None,
    given: ActivationScheme | None,
) -> ActivationScheme:
    if table is not None:
        bits = int(record.get("a_bits", meta.get("a_bits", 4)))
        percentile = float(record.get("act_percentile", 99.9))
        return ActivationScheme("per_step_channel", bits=bits, percentile=percentile)
    if given is None:
        raise NumericsError(
            "the record holds no activation scales (the published runtime measures them on its "
            "first batches); say how to round them: activation none, per_token or per_token_group"
        )
    return given


def _steps(policy: Policy, inside: bool) -> int | None:
    return policy.num_steps if inside else None


def _recipe(layers: Mapping[str, QuantizedLayer]) -> Recipe:
    """The schemes of the first layer of each side; every layer's own is in its manifest entry."""
    sides: dict[str, SideRecipe] = {}
    for layer in layers.values():
        sides.setdefault(layer.side, SideRecipe(layer.scheme))
    return Recipe("published", sides.get("backbone"), sides.get("action_head"))


def _origin(published: Published) -> dict[str, Any]:
    with open(published.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    meta = json.loads(json.dumps(dict(published.meta), default=str))
    return {"source": "published pack", "file": published.path.name, "sha256": digest, "meta": meta}
