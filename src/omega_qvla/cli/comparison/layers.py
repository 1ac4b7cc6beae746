"""Drift layer by layer and the look of activations, for the report; kept as JSON per cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.cli.comparison.observations import load_observations
from omega_qvla.cli.measure import drift_seeds
from omega_qvla.evaluation.diagnostics import (
    LayerDiagnostics,
    Range,
    diagnose_layers,
    worst_layers,
)
from omega_qvla.evaluation.layer_drift import LayerDrift, layer_drift
from omega_qvla.files import atomic_file
from omega_qvla.pack.apply import apply_pack
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import load_policy

if TYPE_CHECKING:
    from omega_qvla.cli.comparison.cells import Cell, Say
    from omega_qvla.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class CellLayers:
    """layers: arm -> drift per layer and step; diagnostics: the layers that the first arm hurts
    most, one per side, under the change of basis of the arm that is shown."""

    layers: Mapping[str, LayerDrift]
    diagnostics: tuple[LayerDiagnostics, ...]


def layers_file(folder: Path) -> Path:
    """Of a cell's folder."""
    return folder / "layers.json"


def measure_layers(cell: Cell, policy: Policy, say: Say) -> None:
    """Write the cell's file, unless it is there."""
    plan = cell.plan
    samples = load_observations(plan, "held-out")
    # Every n-th: they are ordered by task and episode, and all tasks shall be among them.
    few = slice(None, None, max(1, len(samples) // plan.layer_samples))
    observations, seeds = list(samples.observations)[few], drift_seeds(samples)[few]
    layers = {}
    for arm in plan.arms:
        say(f"{cell}: drift of {arm.name} by layer, {len(observations)} observations")
        pack = read_pack(cell.pack(arm.name))
        quantized: Policy = load_policy(cell.checkpoint, device=plan.device)
        apply_pack(quantized, pack, plan.backend)
        layers[arm.name] = layer_drift(policy, quantized, observations, seeds, list(pack.layers))
    shown = read_pack(cell.pack(plan.shown)).layers
    chosen = {}
    for side in ("backbone", "action_head"):
        local = layers[plan.arms[0].name].local
        errors = {n: e for n, e in local.items() if n in shown and shown[n].side == side}
        chosen.update({name: shown[name] for name in worst_layers(errors)})
    diagnostics = diagnose_layers(policy, observations, chosen, seeds=seeds)
    _write(layers_file(cell.folder), CellLayers(layers, diagnostics))


def _write(path: Path, measured: CellLayers) -> None:
    plain = dataclasses.asdict(measured)
    for layer in plain["diagnostics"]:
        for key in ("channels_before", "channels_after"):
            layer[key] = layer[key].tolist()
    with atomic_file(path, parents=True) as stream:
        stream.write(json.dumps(plain).encode())


def read_layers(folder: Path) -> CellLayers:
    """What `measure_layers` wrote."""
    plain = json.loads(layers_file(folder).read_text(encoding="utf-8"))
    return CellLayers(
        layers={
            arm: LayerDrift(_errors(d["local"]), _errors(d["accumulated"]), d["num_steps"])
            for arm, d in plain["layers"].items()
        },
        diagnostics=tuple(_diagnostics(d) for d in plain["diagnostics"]),
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
