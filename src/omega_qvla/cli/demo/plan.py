"""What the demo does, as a value; where its files are; and when old ones may be used."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla import __version__
from omega_qvla.cli.checkpoints import family_of, open_checkpoint
from omega_qvla.cli.sources import EXPERT, check_tasks
from omega_qvla.config.presets import preset
from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.evaluation.files import replace_file
from omega_qvla.evaluation.records import Protocol

#: The quantized arms, in the order of the tables.
ARMS = ("rtn", "omega-paper", "omega")
PLAIN, OUTLIERS = "plain", "outliers"
VARIANTS = (PLAIN, OUTLIERS)
#: Per task and arm: so many that the whole demo takes some five minutes on two cores.
EPISODES = 4


@dataclass(frozen=True)
class DemoPlan:
    """Everything that the demo is asked to do.

    checkpoints: family -> directory.
    episodes: per task and arm.  record: seeds (of `episodes`) whose frames are kept.
    collect_episodes: expert episodes per task, for calibration and again for drift.
    num_samples, held_out: observations used of those.
    layer_samples: observations behind the drift per layer.
    ratio: largest channel over the median one that the outlier variants get.
    env, env_options, collector: as in `evaluation.plan.Plan` and `sources.collect_episodes`.
    command: what a user types to repeat it.
    """

    out: Path
    checkpoints: Mapping[str, Path]
    tasks: tuple[str, ...]
    episodes: int = EPISODES
    workers: int = 2
    record: int = 1
    collect_episodes: int = 2
    num_samples: int = 48
    held_out: int = 60
    layer_samples: int = 12
    token_cap: int = 1024
    ratio: float = 100.0
    seed: int = 0
    env: str = "metaworld"
    env_options: Mapping[str, Any] = field(default_factory=dict)
    collector: str = EXPERT
    protocol: Protocol = field(default_factory=Protocol)
    command: str = "omega-qvla demo"

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every (family, variant)."""
        return [(family, variant) for family in self.checkpoints for variant in VARIANTS]

    def folder(self, family: str, variant: str) -> Path:
        """Where the files of a family and variant lie."""
        return self.out / family / variant

    def checkpoint(self, family: str, variant: str) -> Path:
        """The bundled checkpoint, or its copy with outlier channels."""
        if variant == PLAIN:
            return self.checkpoints[family]
        return self.folder(family, variant) / "checkpoint"

    def pack(self, family: str, variant: str, arm: str) -> Path:
        """The pack of an arm."""
        return self.folder(family, variant) / f"{arm}.safetensors"

    def settings(self) -> dict[str, Any]:
        """What the files in `out` depend on; more episodes or workers change none of them."""
        return {
            "omega_qvla": __version__,
            "checkpoints": {
                family: _sha256(path / "model.safetensors")
                for family, path in self.checkpoints.items()
            },
            "recipes": {arm: preset(arm).to_dict() for arm in ARMS},
            "tasks": list(self.tasks),
            "samples": [self.collect_episodes, self.num_samples, self.held_out],
            "layer_samples": self.layer_samples,
            "token_cap": self.token_cap,
            "ratio": self.ratio,
            "seed": self.seed,
            "env": [self.env, dict(self.env_options)],
            "collector": self.collector,
        }

    def bind(self) -> None:
        """Take `out` for this plan. Raises ConfigError if it holds files of another one."""
        file, mine = self.out / "settings.json", self.settings()
        if file.exists():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            if differing:
                raise ConfigError(
                    f"{self.out} holds a demo with other {', '.join(differing)}; "
                    "give another --out, or delete it"
                )
        with replace_file(file) as stream:
            stream.write(json.dumps(mine, indent=1).encode())


def plan_from_arguments(args: argparse.Namespace) -> DemoPlan:
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
        "command": f"omega-qvla demo{' --quick' * args.quick} --episodes {episodes} "
        f"--out {args.out}",
    }
    if not args.quick:
        return DemoPlan(tasks=tasks, **common)
    return DemoPlan(
        tasks=tasks if args.tasks else tuple(TASKS)[:2],
        collect_episodes=1,
        num_samples=8,
        held_out=8,
        layer_samples=4,
        **common,
    )


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


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
