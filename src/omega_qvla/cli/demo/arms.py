"""One family and variant: its checkpoint, its calibration, and the packs of its arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from omega_qvla.calibration.collect import Calibration, calibrate
from omega_qvla.cli.calibrate import layer_names
from omega_qvla.cli.demo.drift import measure_drift
from omega_qvla.cli.demo.observations import load_observations
from omega_qvla.cli.demo.plan import ARMS, OUTLIERS, DemoPlan
from omega_qvla.cli.parsing import SIDES
from omega_qvla.config.presets import preset
from omega_qvla.config.recipe import Recipe
from omega_qvla.pack.merge import merge_packs
from omega_qvla.pack.verify import verify_pack
from omega_qvla.policies.base import Policy
from omega_qvla.policies.outliers import add_outliers
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy

#: Takes a line for the user.
Say = Callable[[str], None]
#: Built as two packs that are merged, to show it.
MERGED = "omega"


@dataclass(frozen=True)
class Cell:
    """One family and variant of a plan; picklable work for a process."""

    plan: DemoPlan
    family: str
    variant: str

    @property
    def folder(self) -> Path:
        """Its files."""
        return self.plan.folder(self.family, self.variant)

    @property
    def checkpoint(self) -> Path:
        """Its checkpoint."""
        return self.plan.checkpoint(self.family, self.variant)


def build_cell(cell: Cell, say: Say) -> None:
    """Everything up to the closed loop; what is there already is only verified."""
    torch.set_num_threads(1)  # parallelism is one process per core
    cell.folder.mkdir(parents=True, exist_ok=True)
    name = f"{cell.family}, {cell.variant}"
    if cell.variant == OUTLIERS and not (cell.checkpoint / "model.safetensors").exists():
        say(f"{name}: adding outlier channels")
        _make_outliers(cell)
    policy = load_policy(cell.checkpoint)
    recipes = {arm: preset(arm) for arm in ARMS}
    todo = [arm for arm in ARMS if not cell.plan.pack(cell.family, cell.variant, arm).exists()]
    if todo:
        calibration = _calibration(cell, policy, list(recipes.values()), say)
        for arm in todo:
            say(f"{name}: building {arm}")
            _build(cell, policy, arm, recipes[arm], calibration)
    for arm in ARMS:
        checks = verify_pack(cell.plan.pack(cell.family, cell.variant, arm), policy)
        say(f"{name}: {arm} verified, {len(checks)} checks")
    measure_drift(cell, policy, say)


def _make_outliers(cell: Cell) -> None:
    """The same function with outlier channels, saved as a checkpoint (weights last)."""
    policy = load_policy(cell.plan.checkpoints[cell.family])
    add_outliers(policy, cell.plan.ratio, seed=cell.plan.seed)
    save_policy(policy, cell.checkpoint, torch.float32)


def _calibration(cell: Cell, policy: Policy, recipes: list[Recipe], say: Say) -> Calibration:
    """One calibration for all recipes."""
    path = cell.folder / "calibration.safetensors"
    if path.exists():
        return Calibration.load(path)
    samples = load_observations(cell.plan, "calibration")
    say(f"{cell.family}, {cell.variant}: calibrating on {len(samples)} observations")
    calibration = calibrate(
        policy,
        samples,
        layer_names(policy, recipes),
        token_cap=cell.plan.token_cap,
        seed=cell.plan.seed,
    )
    calibration.save(path)
    return calibration


def _build(cell: Cell, policy: Policy, arm: str, recipe: Recipe, calibration: Calibration) -> None:
    out = cell.plan.pack(cell.family, cell.variant, arm)
    if arm != MERGED:
        quantize_policy(policy, recipe, None, out=out, calibration=calibration)
        return
    parts = [cell.folder / f"{arm}-{side}.safetensors" for side in SIDES]
    for side, part in zip(SIDES, parts, strict=True):
        if not part.exists():
            quantize_policy(policy, recipe, None, out=part, sides=(side,), calibration=calibration)
    merge_packs(parts, out)
