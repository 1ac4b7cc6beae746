"""Drift of a cell's arms: of the actions, and layer by layer; kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.cli.demo.observations import load_observations
from omega_qvla.cli.demo.plan import ARMS
from omega_qvla.cli.measure import drift_seeds
from omega_qvla.evaluation.diagnostics import (
    LayerDiagnostics,
    Range,
    diagnose_layers,
    worst_layers,
)
from omega_qvla.evaluation.files import replace_file
from omega_qvla.evaluation.layer_drift import LayerDrift, layer_drift
from omega_qvla.evaluation.open_loop import Drift, chunk_drift, predict_chunks
from omega_qvla.pack.apply import apply_pack
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import load_policy

if TYPE_CHECKING:
    from omega_qvla.cli.demo.arms import Cell
    from omega_qvla.policies.base import Policy

_FILE = "drift.json"
#: The arm whose change of basis the report shows.
SHOWN = "omega"


@dataclasses.dataclass(frozen=True)
class CellDrift:
    """What was measured of one family and variant.

    drift: arm -> drift of the action chunk; layers: arm -> drift per layer and step.
    sizes: arm -> (bytes of the quantized layers, the same in 16 bit).
    backends: arm -> what ran its quantized layers.
    diagnostics: the layers that the naive arm hurts most, one per side, under `SHOWN`.
    """

    drift: Mapping[str, Drift]
    layers: Mapping[str, LayerDrift]
    sizes: Mapping[str, tuple[int, int]]
    backends: Mapping[str, str]
    diagnostics: tuple[LayerDiagnostics, ...]


def measure_drift(cell: Cell, policy: Policy, say: Callable[[str], None]) -> None:
    """Write the cell's drift file, unless it is there."""
    path = cell.folder / _FILE
    if path.exists():
        return
    samples = load_observations(cell.plan, "held-out")
    observations, seeds = list(samples.observations), drift_seeds(samples)
    # Every n-th: they are ordered by task and episode, and all tasks shall be among them.
    few = slice(None, None, max(1, len(observations) // cell.plan.layer_samples))
    expected = predict_chunks(policy, observations, seeds)
    drift, layers, sizes, backends = {}, {}, {}, {}
    for arm in ARMS:
        say(f"{cell.family}, {cell.variant}: drift of {arm}, {len(samples)} observations")
        pack = read_pack(cell.plan.pack(cell.family, cell.variant, arm))
        quantized: Policy = load_policy(cell.checkpoint)
        report = apply_pack(quantized, pack)
        sizes[arm] = (report.layer_bytes, report.layer_bytes_16bit)
        backends[arm] = report.backend
        drift[arm] = chunk_drift(expected, predict_chunks(quantized, observations, seeds))
        layers[arm] = layer_drift(
            policy, quantized, observations[few], seeds[few], list(pack.layers)
        )
    shown = read_pack(cell.plan.pack(cell.family, cell.variant, SHOWN)).layers
    chosen = {}
    for side in ("backbone", "action_head"):
        errors = {n: e for n, e in layers[ARMS[0]].local.items() if shown[n].side == side}
        chosen.update({name: shown[name] for name in worst_layers(errors)})
    diagnostics = diagnose_layers(policy, observations[few], chosen, seeds=seeds[few])
    _write(path, CellDrift(drift, layers, sizes, backends, diagnostics))


def _write(path: Path, measured: CellDrift) -> None:
    plain = dataclasses.asdict(measured)
    for layer in plain["diagnostics"]:
        for key in ("channels_before", "channels_after"):
            layer[key] = layer[key].tolist()
    with replace_file(path) as stream:
        stream.write(json.dumps(plain).encode())


def read_drift(folder: Path) -> CellDrift:
    """What `measure_drift` wrote."""
    plain = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return CellDrift(
        drift={
            arm: Drift(**{**d, "channel_nmse": tuple(d["channel_nmse"])})
            for arm, d in plain["drift"].items()
        },
        layers={
            arm: LayerDrift(_errors(d["local"]), _errors(d["accumulated"]), d["num_steps"])
            for arm, d in plain["layers"].items()
        },
        sizes={arm: (stored, full) for arm, (stored, full) in plain["sizes"].items()},
        backends=plain["backends"],
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
    )
