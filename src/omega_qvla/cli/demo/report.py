"""The demo's report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla.cli.checkpoints import open_checkpoint
from omega_qvla.cli.demo.drift import SHOWN
from omega_qvla.cli.demo.loop import recorded, traces
from omega_qvla.cli.demo.plan import ARMS, OUTLIERS, PLAIN, DemoPlan
from omega_qvla.cli.demo.table import FAMILY_NAMES
from omega_qvla.cli.formats import count
from omega_qvla.evaluation.environment import environment
from omega_qvla.evaluation.records import REFERENCE, Episode, EpisodeRecord
from omega_qvla.evaluation.report import (
    DriftView,
    LayerView,
    PairedEpisode,
    ReportData,
    write_report,
)

if TYPE_CHECKING:
    from omega_qvla.cli.demo.run import Measured
    from omega_qvla.evaluation.summary import Summary

_ARMS = {
    REFERENCE: "the checkpoint as it is",
    "rtn": "naive W4A4: weights rounded to nearest with one scale per row, activations with one "
    "scale per token",
    "omega-paper": "the published recipe: SVD and Hadamard rotations, a table of scales per "
    "denoising step and channel; computed in floating point, since those scales do not factor "
    "out of an integer product; its rotations are stored and count as bytes",
    "omega": "W4A4 made for integer arithmetic: robust smoothing, Hadamard rotation, GPTQ, scales "
    "per token and group of 64 channels, a rank-4 residual in the action head",
}
_ACTIONS = ("dx", "dy", "dz", "gripper")


def make_report(
    plan: DemoPlan,
    summary: Summary,
    records: Sequence[EpisodeRecord],
    measured: Measured,
    path: Path,
) -> Path:
    """Write the page."""
    data = ReportData(
        summary=summary,
        title="Two robot policies at 4 bits",
        featured=SHOWN,
        arms=_ARMS,
        families=FAMILY_NAMES,
        layer_drift=tuple(
            DriftView(family, variant, arm, found.layers[arm])
            for (family, variant), found in measured.items()
            for arm in ARMS
        ),
        layer_views=tuple(
            LayerView(family, variant, SHOWN, found.diagnostics)
            # Outliers first: the page shows the first one unfolded.
            for (family, variant), found in sorted(measured.items(), key=lambda m: m[0][1])
        ),
        episodes=tuple(_episodes(plan, records)),
        action_names=_ACTIONS if plan.env == "metaworld" else (),
        environment=environment(),
        notes=_notes(plan, measured),
        command=plan.command,
    )
    return write_report(data, path)


def _episodes(plan: DemoPlan, records: Sequence[EpisodeRecord]) -> list[PairedEpisode]:
    """One recorded episode per family, of the outlier variant, where quantization shows."""
    solved = {(r.family, r.variant, r.arm, r.episode): r.success for r in records}
    found = []
    for family in plan.checkpoints:

        def telling(episode: Episode, family: str = family) -> tuple[bool, bool]:
            return (
                solved.get((family, OUTLIERS, REFERENCE, episode), False),
                solved.get((family, OUTLIERS, SHOWN, episode), False),
            )

        best = max(recorded(plan), key=telling)
        arms = traces(plan, family, OUTLIERS, best)
        shown = {label: arms[label] for label in (REFERENCE, SHOWN, "rtn")}
        found.append(PairedEpisode(family, OUTLIERS, best.task, best.seed, shown))
    return found


def _notes(plan: DemoPlan, measured: Measured) -> tuple[str, ...]:
    protocol = plan.protocol
    backends = {f"{arm}: {name}" for m in measured.values() for arm, name in m.backends.items()}
    totals = {
        FAMILY_NAMES[family]: sum(open_checkpoint(path).parameters().values())
        for family, path in plan.checkpoints.items()
    }
    variants: Mapping[str, str] = {
        PLAIN: "as trained",
        OUTLIERS: f"channels scaled up to {plan.ratio:.0f} times the median and the layers that "
        "read them scaled down, so that the function is the same",
    }
    return (
        "Two small policies, trained for this: "
        + ", ".join(f"{name}, {count(total)} parameters" for name, total in totals.items())
        + ".",
        f"{len(plan.tasks)} tasks with {plan.episodes} episode(s) each per arm, from initial "
        "states that training never saw; every arm starts from the same state and denoises the "
        "same noise.",
        f"{protocol.execute} actions of each chunk are executed before the policy looks again; "
        f"an episode has failed after {protocol.max_steps} steps.",
        f"Calibration on {plan.num_samples} observations, drift on {plan.held_out} others, from "
        "different episodes of scripted experts.",
        f"Drift per layer on about {plan.layer_samples} of the held-out observations.",
        *(f"Checkpoint variant {name!r}: {text}." for name, text in variants.items()),
        f"Backends of the quantized layers: {', '.join(sorted(backends))}.",
        "omega is built as two packs, backbone and action head, that are merged.",
    )
