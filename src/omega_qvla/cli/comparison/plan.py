"""What is compared, as a value; where its files are; and when old ones may be used."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla.cli.comparison.arms import ArmSpec
from omega_qvla.cli.parsing import SIDES
from omega_qvla.cli.sources import EXPERT
from omega_qvla.config.recipe import Recipe
from omega_qvla.errors import ConfigError, RecipeError
from omega_qvla.evaluation.policies import file_digest, tree_digest
from omega_qvla.evaluation.records import REFERENCE, Protocol
from omega_qvla.files import write_text
from omega_qvla.quantize import software

PLAIN, OUTLIERS = "plain", "outliers"
#: Settings that may grow: what is in there already must stay as it is.
_GROWING = ("checkpoints", "arms")


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison is asked to do.

    out: where the records and tables go; `work`: the files that can be made again
        (checkpoints with outliers, observations, calibrations, packs), `out` by default.
    checkpoints: name -> directory.  variants: of each, `plain` and perhaps `outliers`.
    arms: the quantized ones; full precision is always there.
    episodes: per task and arm; 0 plays none.  record: seeds whose frames are kept.
    collect_episodes: expert episodes per task, for calibration and again for drift.
    num_samples, held_out: observations used of those.
    draws: noises per held-out observation.
    layer_samples: held-out observations behind the drift per layer; 0 measures none.
    shown: the arm whose change of basis the report shows, and that it compares first.
    merged: arms built as two packs that are merged, to show it.
    ratio: largest channel over the median one that the outlier variants get.
    env, env_options, collector: as in `evaluation.plan.Plan` and `sources.collect_episodes`.
    backend, device: what runs the quantized layers, and where everything runs.
    command: what a user types to repeat it.
    """

    out: Path
    checkpoints: Mapping[str, Path]
    arms: tuple[ArmSpec, ...]
    tasks: tuple[str, ...]
    variants: tuple[str, ...] = (PLAIN,)
    work: Path | None = None
    episodes: int = 4
    workers: int = 2
    record: int = 1
    collect_episodes: int = 2
    num_samples: int = 48
    held_out: int = 60
    draws: int = 1
    layer_samples: int = 0
    shown: str = "omega"
    merged: tuple[str, ...] = ()
    token_cap: int = 1024
    ratio: float = 100.0
    seed: int = 0
    env: str = "metaworld"
    env_options: Mapping[str, Any] = field(default_factory=dict)
    collector: str = EXPERT
    protocol: Protocol = field(default_factory=Protocol)
    backend: str = "auto"
    device: str = "cpu"
    command: str = "omega-qvla compare"

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every (checkpoint, variant)."""
        return [(name, variant) for name in self.checkpoints for variant in self.variants]

    @property
    def work_dir(self) -> Path:
        """Where the files are that can be made again."""
        return self.work or self.out

    @property
    def most_samples(self) -> int:
        """The largest number of calibration observations that an arm takes."""
        return max([self.num_samples, *(arm.samples or 0 for arm in self.arms)])

    def folder(self, name: str, variant: str) -> Path:
        """Where the files of a checkpoint and variant lie."""
        return self.work_dir / name / variant

    def checkpoint(self, name: str, variant: str) -> Path:
        """The checkpoint itself, or its copy with outlier channels."""
        if variant == PLAIN:
            return self.checkpoints[name]
        return self.folder(name, variant) / "checkpoint"

    def pack(self, name: str, variant: str, arm: str) -> Path:
        """The pack of an arm."""
        return self.folder(name, variant) / f"{arm}.safetensors"

    def parts(self, name: str, variant: str, arm: str) -> tuple[Path, ...]:
        """The packs that an arm is merged from, by side, where it is `merged`."""
        folder = self.folder(name, variant)
        return tuple(folder / f"{arm}-{side}.safetensors" for side in SIDES)

    def settings(self) -> dict[str, Any]:
        """What the files in `out` depend on; more episodes or workers change none of them."""
        return {
            "software": software(),
            "checkpoints": {name: _weights_digest(path) for name, path in self.checkpoints.items()},
            "arms": {arm.name: arm.settings() for arm in self.arms},
            "tasks": list(self.tasks),
            "samples": [self.collect_episodes, self.num_samples, self.held_out],
            "draws": self.draws,
            "layer_samples": self.layer_samples,
            "token_cap": self.token_cap,
            "ratio": self.ratio,
            "seed": self.seed,
            "env": [self.env, dict(self.env_options)],
            "collector": self.collector,
            "backend": self.backend if self.device == "cpu" else f"{self.backend}, {self.device}",
        }

    def bind(self) -> None:
        """Take `out` for this comparison; arms and checkpoints may join those of an earlier one.

        Raises:
            ConfigError: it holds files of another one; what differs is named.
        """
        self._write(_joined(self.out, self._known(), self.settings()))

    def forget(self, arms: Collection[str]) -> None:
        """Take arms out of what `out` is bound to.

        Raises:
            ConfigError: it holds files of another comparison, or there is no such arm.
        """
        known = self._known()
        there = {REFERENCE, *known.get("arms", {}), *(arm.name for arm in self.arms)}
        unknown = sorted(set(arms) - there)
        if unknown:
            raise ConfigError(
                f"there is no arm {', '.join(unknown)} in {self.out}; there are "
                f"{', '.join(sorted(there))}"
            )
        if known:
            left = {name: v for name, v in known.get("arms", {}).items() if name not in arms}
            known["arms"] = left
            _joined(self.out, known, self.settings())
            self._write(known)

    def _known(self) -> dict[str, Any]:
        """The settings that `out` is bound to, empty where it is to none."""
        file = self.out / "settings.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    def _write(self, settings: Mapping[str, Any]) -> None:
        write_text(self.out / "settings.json", json.dumps(settings, indent=1) + "\n")


def _joined(out: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """The settings of both. Raises ConfigError where they differ."""
    if not theirs:
        return mine
    differing = sorted(
        key
        for key in {*mine, *theirs} - {*_GROWING}
        if json.loads(json.dumps(mine.get(key))) != theirs.get(key)
    )
    for key in _GROWING:
        known = theirs.get(key, {})
        differing += [
            f"{key} ({name})"
            for name, value in mine[key].items()
            if name in known and _completed(known[name]) != value
        ]
    if differing:
        raise ConfigError(
            f"{out} holds results with other {', '.join(differing)}; give another --out, delete "
            "it, or measure changed arms again with --redo"
        )
    return mine | {key: {**theirs.get(key, {}), **mine[key]} for key in _GROWING}


def _completed(value: Any) -> Any:
    """Settings of an arm with the recipe fields that have come since, at their defaults."""
    if not isinstance(value, dict) or "recipe" not in value:
        return value
    try:
        return {**value, "recipe": Recipe.from_dict(value["recipe"]).to_dict()}
    except RecipeError:
        return value


def _weights_digest(checkpoint: Path) -> str:
    """Of the file of weights; of a checkpoint in several files, of all its files."""
    single = checkpoint / "model.safetensors"
    return file_digest(single, {}) if single.is_file() else tree_digest(checkpoint, {})
