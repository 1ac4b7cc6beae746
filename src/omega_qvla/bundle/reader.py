"""Loading a bundle: the network is built without weights, then given only those it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from omega_qvla.bundle.families import BAKED, LAYOUTS, Bundled, blank_policy, install_baked
from omega_qvla.bundle.manifest import PACK, REST, BundleManifest, read_bundle
from omega_qvla.bundle.sizes import narrows
from omega_qvla.bundle.slim import Slim, slim
from omega_qvla.errors import BundleError
from omega_qvla.modules.linear import replace_linears
from omega_qvla.pack.activation_bits import with_activation_bits
from omega_qvla.pack.apply import ApplyReport, Missing, check_complete, check_steps
from omega_qvla.pack.files import read_header
from omega_qvla.pack.reader import load_tensors, read_pack
from omega_qvla.policies.checkpoint import run_dtype
from omega_qvla.policies.files import read_json
from omega_qvla.policies.registry import CONFIG


def load_bundle(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    act_bits: int | None = None,
    missing: Missing = "fallback",
    verify: bool = True,
) -> tuple[Bundled, ApplyReport]:
    """The policy of a bundle, ready to act, and what runs its quantized layers.

    The network is built on the meta device and the quantized layers are put in place first,
    so they never exist in 16 or 32 bits; the other tensors are read one at a time.

    Args:
        backend, device, dtype, act_bits, missing: as for a checkpoint with a pack.
        verify: prove every file by its sha256 first (one pass over the bundle).

    Raises:
        BundleError: a file is missing, truncated or altered, or does not fit the others.
        PackError: the pack and the configuration disagree.
        BackendError: `backend` cannot run the pack here.
    """
    folder, target = Path(path), torch.device(device)
    manifest = read_bundle(folder, verify)
    policy = outline(folder, manifest)
    pack = read_pack(folder / PACK, verify=False)
    if pack.manifest.family != manifest.family:
        raise BundleError(f"{folder}: a {pack.manifest.family} pack in a {manifest.family} bundle")
    check_steps(pack.manifest, policy.num_steps)
    if missing == "error":
        check_complete(policy, pack)
    layers = pack.layers if act_bits is None else with_activation_bits(pack.layers, act_bits)
    together = [site.consumers for site in policy.sites()]
    used = replace_linears(policy.module, layers, backend, target, together)
    slimmed = slim(policy, manifest.options, pack.layers, dtype)
    _load_rest(folder / REST, policy, slimmed, target, dtype)
    policy.module.requires_grad_(False)
    sizes = pack.sizes()
    report = ApplyReport(
        backend=used.name,
        native=used.capabilities().native,
        layers=len(pack.layers),
        layer_bytes=sizes.layer_bytes,
        layer_bytes_16bit=sizes.layer_bytes_16bit,
    )
    return policy, report


def outline(folder: Path, manifest: BundleManifest) -> Bundled:
    """The policy of a bundle without any weights; its linear layers are still plain ones."""
    config = read_json(folder / CONFIG)
    kept = manifest.embodiment is not None
    policy = blank_policy(manifest.family, config, folder, one_embodiment=kept)
    if policy.num_steps != manifest.num_steps:
        raise BundleError(
            f"{folder}: config.json runs {policy.num_steps} denoising steps, the bundle was "
            f"written for {manifest.num_steps}"
        )
    return policy


def _load_rest(
    file: Path, policy: Bundled, slimmed: Slim, device: torch.device, dtype: torch.dtype
) -> None:
    header = read_header(file, BundleError)
    baked = [name for name in header.entries if name.startswith(BAKED)]
    wanted = policy.module.state_dict()
    stored = set(header.entries) - set(baked)
    if stored != set(wanted):
        odd = sorted(stored ^ set(wanted))
        raise BundleError(f"{file}: {len(odd)} tensors are missing or foreign: {odd[0]} first")
    layout, loaded = LAYOUTS[policy.family], {}
    for name, blank in wanted.items():
        tensor = load_tensors(file, [name], BundleError)[name]
        if tensor.shape != blank.shape:
            raise BundleError(f"{file}: {name} has shape {list(tensor.shape)}, not its layer's")
        kind = run_dtype(name, layout, dtype)
        kind = kind if narrows(name, tensor, slimmed.int8) else tensor.dtype
        loaded[name] = tensor.to(device, kind, copy=True)
    policy.module.load_state_dict(loaded, strict=True, assign=True)
    if baked:
        tensors: dict[str, Tensor] = load_tensors(file, baked, BundleError)
        install_baked(policy, tensors, device)
