"""The demo as a comparison: which checkpoints, which recipes, how much of everything."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.cli.checkpoints import family_of, open_checkpoint
from omega_qvla.cli.comparison.arms import parse_arms
from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison
from omega_qvla.cli.demo.verb import FAMILIES
from omega_qvla.cli.sources import check_tasks
from omega_qvla.errors import CheckpointError, ConfigError

#: The quantized arms, in the order of the tables.
ARMS = ("rtn", "omega-paper", "omega")
#: Per task and arm: so many that the whole demo takes some five minutes on two cores.
EPISODES = 4


def demo_plan(
    out: Path, checkpoints: Mapping[str, Path], tasks: tuple[str, ...], **options: Any
) -> Comparison:
    """The demo's comparison on these checkpoints; `options` are fields of it."""
    fields: dict[str, Any] = {
        "variants": (PLAIN, OUTLIERS),
        "episodes": EPISODES,
        "layer_samples": 12,
        "merged": ("omega",),
        "command": "omega-qvla demo",
        **options,
    }
    return Comparison(out, checkpoints, parse_arms(ARMS), tasks, **fields)


def plan_from_arguments(args: argparse.Namespace) -> Comparison:
    """The plan of a command line. Raises ConfigError, CheckpointError."""
    from omega_qvla.envs.metaworld import TASKS

    found = find_checkpoints(args.assets, args.families)
    sizes = {family: open_checkpoint(path).image_size for family, path in found.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"the checkpoints see images of different sizes: {sizes}")
    options = {"size": next(iter(sizes.values()))}
    tasks = tuple(check_tasks(args.tasks or list(TASKS)))
    episodes = args.episodes or (1 if args.quick else EPISODES)
    common: dict[str, Any] = {
        "out": args.out,
        "checkpoints": found,
        "episodes": episodes,
        "workers": args.workers,
        "env_options": options,
        "command": _command(args, episodes),
    }
    if not args.quick:
        return demo_plan(tasks=tasks, **common)
    return demo_plan(
        tasks=tasks if args.tasks else tuple(TASKS)[:2],
        collect_episodes=1,
        num_samples=8,
        held_out=8,
        layer_samples=4,
        **common,
    )


def _command(args: argparse.Namespace, episodes: int) -> str:
    """What a user types to have the same again: whatever decides about the numbers."""
    words = ["omega-qvla", "demo", *(["--quick"] * args.quick), "--episodes", str(episodes)]
    if args.tasks:
        words += ["--tasks", *args.tasks]
    if args.families != list(FAMILIES):
        words += ["--families", *args.families]
    if args.assets is not None:
        words += ["--assets", str(args.assets)]
    return shlex.join([*words, "--out", str(args.out)])


def find_checkpoints(assets: Path | None, families: list[str]) -> dict[str, Path]:
    """Family -> the checkpoint of it among the directories in `assets`.

    Raises:
        CheckpointError: no such directory, a family missing, or two of one family.
    """
    folder = assets or _default_assets()
    if not folder.is_dir():
        raise CheckpointError(f"there is no directory {folder}; --assets takes an existing one")
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if (p / "model.safetensors").is_file()):
        family = family_of(path)
        if family in found:
            raise CheckpointError(
                f"{found[family]} and {path} are both {family} checkpoints; leave one in {folder}"
            )
        found[family] = path
    missing = [family for family in families if family not in found]
    if missing:
        raise CheckpointError(
            f"no checkpoint of {', '.join(missing)} in {folder}; give their directory with "
            "--assets, or choose with --families"
        )
    return {family: found[family] for family in families}


def _default_assets() -> Path:
    source_tree = Path(__file__).resolve().parents[4]
    candidates = [source_tree / "assets", Path.cwd() / "assets"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"the demo's checkpoints are not in {' or '.join(map(str, candidates))}: they come with "
        "the source tree; run the demo there, or give their directory with --assets"
    )
