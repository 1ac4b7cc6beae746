"""A comparison's report page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omega_qvla.cli.checkpoints import open_checkpoint
from omega_qvla.cli.comparison.arms import describe
from omega_qvla.cli.comparison.layers import CellLayers, layers_measured
from omega_qvla.cli.comparison.loop import recorded, traces
from omega_qvla.cli.comparison.observations import load_observations, observation_file
from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison
from omega_qvla.cli.comparison.run import Results
from omega_qvla.cli.comparison.table import FAMILY_NAMES
from omega_qvla.cli.formats import count
from omega_qvla.cli.sources import EXPERT
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.records import REFERENCE, ArmKey, Episode
from omega_qvla.evaluation.report import (
    DriftView,
    LayerView,
    PairedEpisode,
    ReportData,
    write_report,
)

_ACTIONS = ("dx", "dy", "dz", "gripper")


def make_report(
    plan: Comparison,
    results: Results,
    path: Path,
    *,
    title: str = "Recipes compared",
    arms: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Path:
    """Write the page.

    arms: label -> a line about it, instead of the recipes' own.  notes: more of them.
    """
    own = {REFERENCE: "the checkpoint as it is", **{a.name: describe(a) for a in plan.arms}}
    layers = {
        cell: found
        for cell in plan.cells
        if plan.layer_samples and (found := layers_measured(plan, *cell, results.drift))
    }
    data = ReportData(
        summary=results.summary,
        title=title,
        featured=plan.shown,
        arms={**own, **(arms or {})},
        families=FAMILY_NAMES,
        layer_drift=_drift_views(plan, layers),
        layer_views=tuple(
            LayerView(*cell, plan.shown, found.diagnostics)
            # Outliers first: the page shows the first one unfolded.
            for cell, found in sorted(layers.items(), key=lambda item: item[0][1])
        ),
        episodes=tuple(_episodes(plan, results)),
        action_names=_ACTIONS if plan.env == "metaworld" else (),
        environment=environment(),
        notes=(*_notes(plan, results), *notes),
        command=plan.command,
    )
    return write_report(data, path)


def _drift_views(
    plan: Comparison, layers: Mapping[tuple[str, str], CellLayers]
) -> tuple[DriftView, ...]:
    return tuple(
        DriftView(*cell, arm.name, found.layers[arm.name])
        for cell, found in layers.items()
        for arm in plan.arms
        if arm.name in found.layers
    )


def _episodes(plan: Comparison, results: Results) -> list[PairedEpisode]:
    """One recorded episode per checkpoint, of the last variant, where quantization shows."""
    solved = {(r.key, r.episode): r.success for r in results.episodes}
    if not solved or not recorded(plan):
        return []
    variant, first, found = plan.variants[-1], plan.arms[0].name, []
    for name in plan.checkpoints:

        def telling(episode: Episode, name: str = name) -> tuple[bool, bool]:
            return (
                solved.get((ArmKey(name, variant, REFERENCE), episode), False),
                solved.get((ArmKey(name, variant, plan.shown), episode), False),
            )

        best = max(recorded(plan), key=telling)
        arms = traces(plan, name, variant, best)
        labels = dict.fromkeys((REFERENCE, plan.shown, first))
        shown = {label: arms[label] for label in labels if label in arms}
        found.append(PairedEpisode(name, variant, best.task, best.seed, shown))
    return found


def _calibrated(plan: Comparison) -> str:
    """How many observations the arms are calibrated on that do not say so themselves."""
    file = observation_file(plan, "calibration")
    if not file.exists():  # the tables of a run whose work was left elsewhere
        return f"at most {plan.num_samples}"
    return str(min(plan.num_samples, len(load_observations(plan, "calibration"))))


def _held_out(plan: Comparison, results: Results) -> int:
    """How many observations drift was measured on; episodes may have held fewer than asked for."""
    counts = [record.drift.count // plan.draws for record in results.drift.values()]
    return counts[0] if counts else plan.held_out


def _recorded_by(plan: Comparison) -> str:
    return "of scripted experts" if plan.collector == EXPERT else f"({plan.collector})"


def _notes(plan: Comparison, results: Results) -> tuple[str, ...]:
    protocol = plan.protocol
    backends = {f"{record.arm}: {record.backend}" for record in results.drift.values()}
    totals = {
        FAMILY_NAMES.get(name, name): sum(open_checkpoint(path).parameters().values())
        for name, path in plan.checkpoints.items()
    }
    variants: Mapping[str, str] = {
        PLAIN: "as trained",
        OUTLIERS: f"channels scaled up to {plan.ratio:.0f} times the median and the layers that "
        "read them scaled down, so that the function is the same",
    }
    draws = f", {plan.draws} noises each" if plan.draws > 1 else ""
    notes = [
        "Checkpoints: "
        + ", ".join(f"{name}, {count(total)} parameters" for name, total in totals.items())
        + ".",
        f"Calibration on {_calibrated(plan)} observations, drift on {_held_out(plan, results)} "
        f"others{draws}, from different episodes {_recorded_by(plan)}.",
        *(f"Checkpoint variant {name!r}: {variants[name]}." for name in plan.variants),
        f"Backends of the quantized layers: {', '.join(sorted(backends))}.",
    ]
    if plan.episodes:
        notes[1:1] = [
            f"{len(plan.tasks)} tasks with {plan.episodes} episode(s) each per arm, from initial "
            "states that training never saw; every arm starts from the same state and denoises "
            "the same noise.",
            f"{protocol.execute} actions of each chunk are executed before the policy looks "
            f"again; an episode has failed after {protocol.max_steps} steps.",
        ]
    if plan.layer_samples:
        notes.append(f"Drift per layer on about {plan.layer_samples} of the held-out observations.")
    return tuple(notes)
