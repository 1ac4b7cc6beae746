"""Drift layer by layer and the look of activations, for the report; kept as JSON per cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.cli.comparison.drift import file_sha256
from omega_qvla.cli.comparison.observations import load_observations
from omega_qvla.cli.measure import drift_seeds
from omega_qvla.evaluation.diagnostics import (
    LayerDiagnostics,
    Range,
    diagnose_layers,
    worst_layers,
)
from omega_qvla.evaluation.layer_drift import LayerDrift, layer_drift
from omega_qvla.evaluation.records import ArmKey
from omega_qvla.files import write_text
from omega_qvla.pack.apply import apply_pack
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import load_policy

if TYPE_CHECKING:
    from omega_qvla.cli.comparison.cells import Cell, Say
    from omega_qvla.cli.comparison.drift import DriftRecord
    from omega_qvla.cli.comparison.plan import Comparison
    from omega_qvla.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class CellLayers:
    """layers: arm -> drift per layer and step; diagnostics: the layers that the arm `hurt` hurts
    most, one per side, under the change of basis of the arm `shown`. packs: arm -> sha256 of
    the pack that was run."""

    layers: Mapping[str, LayerDrift]
    diagnostics: tuple[LayerDiagnostics, ...]
    packs: Mapping[str, str]
    hurt: str
    shown: str


def layers_file(folder: Path) -> Path:
    """Of a cell's folder."""
    return folder / "layers.json"


def layers_measured(
    plan: Comparison, name: str, variant: str, drift: Mapping[ArmKey, DriftRecord]
) -> CellLayers | None:
    """The part of a cell's file that is still true; None if the file is to be made (again).

    An arm may have joined since, or been built anew; another one may be shown.
    """
    found = read_layers(plan.folder(name, variant))
    if found is None or (found.hurt, found.shown) != (plan.arms[0].name, plan.shown):
        return None
    for arm in plan.arms:
        record = drift.get(ArmKey(name, variant, arm.name))
        if record is None or found.packs.get(arm.name) != record.pack:
            return None
    return found


def measure_layers(cell: Cell, policy: Policy, say: Say) -> None:
    """Write the cell's file."""
    plan = cell.plan
    samples = load_observations(plan, "held-out")
    # Every n-th: they are ordered by task and episode, and all tasks shall be among them.
    few = slice(None, None, max(1, len(samples) // plan.layer_samples))
    observations, seeds = list(samples.observations)[few], drift_seeds(samples)[few]
    layers, packs = {}, {}
    for arm in plan.arms:
        say(f"{cell}: drift of {arm.name} by layer, {len(observations)} observations")
        pack = read_pack(cell.pack(arm.name))
        packs[arm.name] = file_sha256(cell.pack(arm.name))
        quantized: Policy = load_policy(cell.checkpoint, device=plan.device)
        apply_pack(quantized, pack, plan.backend)
        layers[arm.name] = layer_drift(policy, quantized, observations, seeds, list(pack.layers))
    shown = read_pack(cell.pack(plan.shown)).layers
    chosen, hurt = {}, plan.arms[0].name
    for side in ("backbone", "action_head"):
        local = layers[hurt].local
        errors = {n: e for n, e in local.items() if n in shown and shown[n].side == side}
        chosen.update({name: shown[name] for name in worst_layers(errors)})
    diagnostics = diagnose_layers(policy, observations, chosen, seeds=seeds)
    found = CellLayers(layers, diagnostics, packs, hurt, plan.shown)
    _write(layers_file(cell.folder), found)


def _write(path: Path, measured: CellLayers) -> None:
    plain = dataclasses.asdict(measured)
    for layer in plain["diagnostics"]:
        for key in ("channels_before", "channels_after"):
            layer[key] = layer[key].tolist()
    write_text(path, json.dumps(plain))


def read_layers(folder: Path) -> CellLayers | None:
    """What `measure_layers` wrote; None where it wrote nothing, or before it named its packs."""
    if not layers_file(folder).exists():
        return None
    plain = json.loads(layers_file(folder).read_text(encoding="utf-8"))
    if "packs" not in plain:
        return None
    return CellLayers(
        layers={
            arm: LayerDrift(_errors(d["local"]), _errors(d["accumulated"]), d["num_steps"])
            for arm, d in plain["layers"].items()
        },
        diagnostics=tuple(_diagnostics(d) for d in plain["diagnostics"]),
        packs=plain["packs"],
        hurt=plain["hurt"],
        shown=plain["shown"],
    )


def _errors(plain: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(s): e for s, e in errors.items()} for name, errors in plain.items()}


def _diagnostics(plain: Mapping[str, Any]) -> LayerDiagnostics:
    def ranges(of: Mapping[str, Mapping[str, float]]) -> dict[int, Range]:
        return {int(step): Range(**values) for step, values in of.items()}

    return LayerDiagnostics(
        name=plain["name"],
        side=plain["side"],
        ranges_before=ranges(plain["ranges_before"]),
        ranges_after=ranges(plain["ranges_after"]),
        channels_before=np.array(plain["channels_before"], np.float32),
        channels_after=np.array(plain["channels_after"], np.float32),
        clip_rates={int(step): rate for step, rate in plain["clip_rates"].items()},
    )
