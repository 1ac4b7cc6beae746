"""Writing a bundle: one folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omega_qvla
from omega_qvla.bundle.families import Bundled, bake, embodied, time_linears, with_steps
from omega_qvla.bundle.manifest import (
    MANIFEST,
    PACK,
    REST,
    BundleManifest,
    describe_file,
    is_bundle,
)
from omega_qvla.bundle.options import BundleOptions
from omega_qvla.bundle.sizes import QUANTIZED, narrows, sizes_by_part
from omega_qvla.bundle.slim import Slim, leave_out, slim
from omega_qvla.bundle.source import Source, open_source
from omega_qvla.errors import BundleError, PackError
from omega_qvla.files import sync, temporary_of
from omega_qvla.modules.int8 import quantize_rows
from omega_qvla.pack.apply import check_steps
from omega_qvla.pack.files import why_not_written, write_tensors
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.manifest import source_digest
from omega_qvla.pack.merge import differing_tensors
from omega_qvla.pack.reader import Pack, read_manifest, read_pack
from omega_qvla.policies.checkpoint import narrowed
from omega_qvla.policies.files import write_json
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.registry import CONFIG, read_outline, source_hash


def write_bundle(
    checkpoint_dir: str | os.PathLike[str],
    pack: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: BundleOptions | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
) -> BundleManifest:
    """Write the bundle of a checkpoint and its pack into the new folder `out`.

    The checkpoint's tensors are read one at a time; the folder appears under its name once
    every file in it is complete and on the disk. Whatever layout the checkpoint has, the
    bundle's settings are written as `save_policy` writes them, so it needs no `settings` later.

    Args:
        checkpoint_dir, settings, tokenizer, revision, offline, cache: as of `load_policy`.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be loaded, or `options.rest` cannot
            hold a value of it.
        PackError: the pack is damaged, or of another checkpoint or number of steps.
        BundleError: `out` exists, is being written or cannot be, or the options do not fit the
            pack.
    """
    options = options or BundleOptions()
    read_manifest(pack)  # a missing or foreign one is named before anything is written
    if is_bundle(checkpoint_dir):
        raise BundleError(f"{checkpoint_dir} is a bundle already; give the original checkpoint")
    found = read_outline(
        checkpoint_dir,
        settings=settings,
        tokenizer=tokenizer,
        revision=revision,
        offline=offline,
        cache=cache,
    )
    policy, steps = found.blank, options.bake_steps
    policy = policy if steps is None else with_steps(policy, steps)
    network = policy.module
    source = open_source(found.files, found.layout, network)
    with _new_folder(Path(out)) as building:
        shutil.copyfile(pack, building / PACK)
        read = read_pack(building / PACK)
        _check_source(policy, read, source)
        _write_settings(policy, building)
        tensors, slimmed = _rest(policy, read, source, options)
        write_tensors(building / REST, tensors, {"format": "omega-qvla bundle rest"})
        quantized = sum(layer.nbytes for layer in read.layers.values())
        manifest = BundleManifest(
            family=policy.family,
            num_steps=policy.num_steps,
            options=options,
            embodiment=_embodiment(policy),
            absent=slimmed.absent,
            parts={QUANTIZED: quantized, **sizes_by_part(tensors, policy.family)},
            files={
                file.relative_to(building).as_posix(): describe_file(file)
                for file in sorted(building.rglob("*"))
                if file.is_file()
            },
            source=source_digest(read.manifest.source),
            software={"omega_qvla": omega_qvla.__version__, "torch": torch.__version__},
        )
        (building / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the body has succeeded."""
    if out.exists():
        raise BundleError(f"{out} exists already; remove it or choose another --out")
    temporary = temporary_of(out)
    try:
        with output_lock(out, BundleError):
            try:
                temporary.mkdir(parents=True)
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    sync(path)
                os.rename(temporary, out)
                sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {why_not_written(error)}") from error


def _check_source(policy: Bundled, pack: Pack, source: Source) -> None:
    """Raise PackError unless the pack was made from this checkpoint and runs these steps."""
    if pack.manifest.family != policy.family:
        raise PackError(
            f"this is a pack of a {pack.manifest.family} policy, the checkpoint is {policy.family}"
        )
    hashes = {name: source_hash(source[name]) for name in source}
    differing = differing_tensors(pack.manifest.source, hashes)
    if differing:
        raise PackError(
            f"this pack was made from another checkpoint: {len(differing)} of {len(hashes)} "
            f"tensors differ, {differing[0]} first; quantize this checkpoint anew"
        )
    check_steps(pack.manifest, policy.num_steps)


def _write_settings(policy: Bundled, folder: Path) -> None:
    """config.json (with the steps that the bundle runs), processor, tokenizer, statistics."""
    write_json(folder / CONFIG, policy.model.config.to_dict())
    policy.processor.save(folder)


def _embodiment(policy: Bundled) -> int | None:
    return policy.processor.config.embodiment_id if isinstance(policy, GrootPolicy) else None


def _rest(
    policy: Bundled, pack: Pack, source: Source, options: BundleOptions
) -> tuple[dict[str, Tensor], Slim]:
    """All tensors that a bundle holds beside its pack."""
    baked = {}
    if options.bake_steps is not None:
        _load_time_layers(policy, source, pack)
        baked = bake(policy, options.bake_steps)
    slimmed = slim(policy, options, pack.layers)
    leave_out(policy, pack.layers)
    row = _embodiment(policy)
    tensors: dict[str, Tensor] = dict(baked)
    for name, wanted in policy.module.state_dict().items():
        module, _, field = name.rpartition(".")
        if module in slimmed.int8 and field == "scale":
            continue  # written with its weight
        tensor = source[name]
        _check_shape(name, tensor, wanted)
        if module in slimmed.int8 and field == "weight":
            tensors[name], tensors[f"{module}.scale"] = quantize_rows(tensor)
            continue
        if row is not None and embodied(name) and len(tensor) > 1:
            tensor = tensor[row : row + 1]
        dtype = options.dtype
        if dtype is not None and narrows(name, tensor, slimmed.int8):
            tensor = narrowed(name, tensor, dtype)
        tensors[name] = tensor
    return tensors, slimmed


def _check_shape(name: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.shape != wanted.shape:
        raise BundleError(
            f"{name} has shape {list(tensor.shape)}, config.json asks for {list(wanted.shape)}"
        )


def _load_time_layers(policy: Bundled, source: Source, pack: Pack) -> None:
    for name in set(time_linears(policy)) - set(pack.layers):
        layer = policy.module.get_submodule(name)
        state = {field: source[f"{name}.{field}"].float() for field in layer.state_dict()}
        layer.load_state_dict(state, strict=True, assign=True)
