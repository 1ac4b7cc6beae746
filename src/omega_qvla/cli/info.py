"""`omega-qvla info`: this machine, or one checkpoint."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.formats import count, size
from omega_qvla.cli.loading import add_loading, loading

DESCRIPTION = """\
Without a path: versions, what the CPU can do, which kernel backends run here (and why
one does not), the named recipes and the policy families.

With the path of a bundle: what it holds, and how (nothing is verified: `verify` does).

With the path of a checkpoint: its family and sizes, and which layers a recipe would
quantize. Nothing is changed and no weights are loaded.
"""
EXAMPLES = """\
  omega-qvla info
  omega-qvla info assets/pi05-metaworld
  omega-qvla info assets/pi05-metaworld --recipe omega-paper --layers
"""
#: CPU flags that decide which integer instructions there are.
_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"),
    *("avx512_bf16", "amx_tile", "amx_int8", "asimd", "asimddp", "i8mm", "sve"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "path", nargs="?", type=Path, help="a checkpoint's (or its id on the Hub) or a bundle's"
    )
    add_loading(parser)
    parser.add_argument(
        "--recipe", default="omega", help="preset or YAML file to ask about (default: omega)"
    )
    parser.add_argument("--layers", action="store_true", help="list every layer it quantizes")


def run(args: argparse.Namespace, console: Console) -> int:
    """Show it."""
    console.result(_machine(console) if args.path is None else _described(args, console))
    return 0


def _described(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from omega_qvla.bundle.manifest import is_bundle

    return _bundle(args, console) if is_bundle(args.path) else _checkpoint(args, console)


def _machine(console: Console) -> dict[str, Any]:
    import omega_qvla
    from omega_qvla.cli.checkpoints import FAMILIES
    from omega_qvla.config.presets import PRESETS
    from omega_qvla.evaluation.environment import environment

    facts = {"omega-qvla": omega_qvla.__version__, **environment()}
    facts["cpu flags"] = " ".join(_cpu_flags()) or "unknown"
    facts["cuda"] = _cuda()
    presets = {name: (make.__doc__ or "").strip().splitlines()[0] for name, make in PRESETS.items()}
    backends = _backends()
    console.facts(facts)
    rows = [
        (b["name"], "yes" if b["available"] else "no", "integers" if b["native"] else "emulated",
         b["why"]) for b in backends
    ]  # fmt: skip
    console.text()
    console.table(["backend", "runs here", "computes on", "because"], rows, left=4)
    console.table(["recipe", "what it does"], list(presets.items()), left=2)
    console.table(["family", "architecture"], list(FAMILIES.items()), left=2)
    return {
        "environment": facts,
        "backends": backends,
        "presets": presets,
        "families": dict(FAMILIES),
    }


def _backends() -> list[dict[str, Any]]:
    from omega_qvla.kernels.registry import backend_names, get_backend

    found = []
    for name in backend_names():
        backend = get_backend(name)
        available, why = backend.available()
        capabilities = backend.capabilities()
        found.append(
            {
                "name": name,
                "available": available,
                "why": why,
                "native": capabilities.native,
                "devices": sorted(capabilities.devices),
                "activations": sorted(capabilities.activation_kinds),
                "isa": list(capabilities.isa),
            }
        )
    return found


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.machine()]
    lines = [x for x in text.splitlines() if x.lower().startswith(("flags", "features"))]
    present = set(lines[0].partition(":")[2].split()) if lines else set()
    return [flag for flag in _FLAGS if flag in present]


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not available"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _checkpoint(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from omega_qvla.cli.checkpoints import FAMILIES, open_checkpoint
    from omega_qvla.config.presets import resolve_recipe

    recipe = resolve_recipe(args.recipe)
    checkpoint = open_checkpoint(args.path, **loading(args))
    data = checkpoint.describe()
    console.facts(
        {
            "checkpoint": checkpoint.path,
            "family": FAMILIES[checkpoint.family],
            "parameters": ", ".join(
                f"{side} {count(number)}" for side, number in data["parameters"].items()
            ),
            "files": size(checkpoint.file_bytes),
            "cameras": f"{', '.join(data['cameras'])} ({checkpoint.image_size} pixels square)",
            "actions": f"{data['action_horizon']} of {data['action_dim']} numbers a chunk, "
            f"{data['num_steps']} denoising steps",
        }
    )
    data["recipe"] = recipe.name
    data["quantized"] = {
        side: _side(checkpoint.policy, recipe, side) for side in ("backbone", "action_head")
    }
    _show_sides(data["quantized"], recipe.name, args.layers, console)
    return data


def _bundle(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from omega_qvla.bundle.manifest import PACK, read_bundle
    from omega_qvla.cli.bundle import show_bundle
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.pack.reader import read_manifest

    data = show_bundle(args.path, read_bundle(args.path, verify=False), console)
    pack = read_manifest(args.path / PACK)
    console.text(f"pack: recipe {pack.recipe.get('name')}, {len(pack.layers)} layers")
    if args.layers:
        for name in pack.layers:
            console.text(name)
    outline = open_checkpoint(args.path, **loading(args)).describe()
    del outline["parameters"]  # of the network, not of what is stored of it
    return {**outline, **data, "recipe": pack.recipe.get("name"), "layers": list(pack.layers)}


def _side(policy: Any, recipe: Any, side: str) -> dict[str, Any]:
    from omega_qvla.policies.targets import select_targets

    side_recipe = recipe.side(side)
    if side_recipe is None:
        return {"layers": [], "parameters": 0, "unused": []}
    chosen = select_targets(policy, side_recipe, side, recipe.allow_protected)
    shapes = [tuple(policy.module.get_submodule(name).weight.shape) for name in chosen.names]
    return {
        "layers": list(chosen.names),
        "parameters": sum(rows * columns for rows, columns in shapes),
        "unused": list(chosen.unused),
    }


def _show_sides(sides: dict[str, Any], recipe: str, every: bool, console: Console) -> None:
    rows = [
        (side, len(d["layers"]), count(d["parameters"]), size(2 * d["parameters"]),
         len(d["unused"])) for side, d in sides.items()
    ]  # fmt: skip
    console.text()
    console.table(
        ["side", "layers", "weights", "in 16 bit", "matched but never run"],
        rows,
        title=f"what recipe {recipe} quantizes",
    )
    if every:
        for data in sides.values():
            for name in data["layers"]:
                console.text(name)
