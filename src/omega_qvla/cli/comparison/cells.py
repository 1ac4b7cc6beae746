"""One checkpoint and variant: its calibrations, the packs of its arms, and their drift."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from omega_qvla.calibration.collect import Calibration, calibrate, provenance
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.cli.calibrate import layer_names
from omega_qvla.cli.comparison.arms import ArmSpec
from omega_qvla.cli.comparison.observations import calibration_set
from omega_qvla.cli.comparison.plan import OUTLIERS, Comparison
from omega_qvla.cli.parsing import SIDES
from omega_qvla.config.recipe import Recipe
from omega_qvla.errors import RecipeError
from omega_qvla.pack.merge import merge_packs
from omega_qvla.pack.reader import read_manifest
from omega_qvla.pack.verify import verify_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.outliers import add_outliers
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy

#: Takes a line for the user.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One checkpoint and variant of a comparison; picklable work for a process."""

    plan: Comparison
    name: str
    variant: str

    @property
    def folder(self) -> Path:
        """Its files."""
        return self.plan.folder(self.name, self.variant)

    @property
    def checkpoint(self) -> Path:
        """Its checkpoint."""
        return self.plan.checkpoint(self.name, self.variant)

    def pack(self, arm: str) -> Path:
        """The pack of an arm."""
        return self.plan.pack(self.name, self.variant, arm)

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}"


class Builder:
    """Makes the packs of one cell; the checkpoint is loaded once, each calibration kept.

    What is there already is only verified, if it is of the arm's recipe: names outlive recipes.
    """

    def __init__(self, cell: Cell, say: Say) -> None:
        torch.set_num_threads(1)  # parallelism is one process per core
        self.cell, self._say = cell, say
        cell.folder.mkdir(parents=True, exist_ok=True)
        if cell.variant == OUTLIERS and not (cell.checkpoint / "model.safetensors").exists():
            say(f"{cell}: adding outlier channels")
            _make_outliers(cell)
        self.policy: Policy = load_policy(cell.checkpoint, device=cell.plan.device)
        self._known: dict[int | None, tuple[ObservationSet, Calibration]] = {}

    def build(self, arm: ArmSpec) -> float | None:
        """Make and verify the pack of an arm. Returns seconds, None if it was there already."""
        path, start, built = self.cell.pack(arm.name), time.perf_counter(), False
        if not self._is_there(path, arm):
            samples, calibration = self._calibration(arm)
            self._say(f"{self.cell}: building {arm.name}")
            start, built = time.perf_counter(), True
            self._quantize(arm, samples, calibration, path)
        seconds = time.perf_counter() - start if built else None
        checks = verify_pack(path, self.policy)
        self._say(f"{self.cell}: {arm.name} verified, {len(checks)} checks")
        return seconds

    def _quantize(
        self, arm: ArmSpec, samples: ObservationSet, calibration: Calibration, out: Path
    ) -> None:
        def build(path: Path, sides: Sequence[str]) -> None:
            quantize_policy(
                self.policy,
                arm.recipe,
                samples,
                out=path,
                sides=sides,
                token_cap=self.cell.plan.token_cap,
                seed=self.cell.plan.seed,
                calibration=calibration,
                cascade=arm.cascade,
            )

        if arm.name not in self.cell.plan.merged:
            build(out, SIDES)
            return
        parts = self.cell.plan.parts(self.cell.name, self.cell.variant, arm.name)
        for side, part in zip(SIDES, parts, strict=True):
            if not self._is_there(part, arm):
                build(part, (side,))
        merge_packs(parts, out)

    def _is_there(self, path: Path, arm: ArmSpec) -> bool:
        """Whether `path` is a pack of the arm; one of another recipe is removed."""
        if not path.exists():
            return False
        if _recipe_of(path) == arm.recipe:
            return True
        self._say(f"{self.cell}: {path.name} is of another recipe than {arm.name}, made again")
        path.unlink()
        return False

    def _calibration(self, arm: ArmSpec) -> tuple[ObservationSet, Calibration]:
        """Observations and statistics, shared by all arms that take as many observations."""
        if arm.samples not in self._known:
            plan = self.cell.plan
            samples = calibration_set(plan, arm.samples)
            names = layer_names(self.policy, [a.recipe for a in plan.arms])
            self._known = {arm.samples: (samples, self._collected(samples, names))}
        return self._known[arm.samples]

    def _collected(self, samples: ObservationSet, names: list[str]) -> Calibration:
        """The calibration of this content from its file, or a new one put there."""
        plan = self.cell.plan
        origin = provenance(self.policy, samples, token_cap=plan.token_cap, seed=plan.seed)
        text = json.dumps([origin, names], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.cell.folder / f"calibration-{len(samples)}-{key}.safetensors"
        if path.exists():
            return Calibration.load(path)
        self._say(f"{self.cell}: calibrating on {len(samples)} observations")
        calibration = calibrate(
            self.policy, samples, names, token_cap=plan.token_cap, seed=plan.seed
        )
        calibration.save(path)
        return calibration


def _recipe_of(path: Path) -> Recipe | None:
    """What a pack was made by; None if that is no recipe (any more)."""
    try:
        return Recipe.from_dict(read_manifest(path).recipe)
    except RecipeError:
        return None


def _make_outliers(cell: Cell) -> None:
    """The same function with outlier channels, saved as a checkpoint (weights last)."""
    policy = load_policy(cell.plan.checkpoints[cell.name])
    add_outliers(policy, cell.plan.ratio, seed=cell.plan.seed)
    save_policy(policy, cell.checkpoint, torch.float32)
