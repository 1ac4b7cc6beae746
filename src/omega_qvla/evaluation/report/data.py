"""What a report is made from. Every part but the summary may be left empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omega_qvla.evaluation.records import REFERENCE, Trace

if TYPE_CHECKING:
    from omega_qvla.evaluation.diagnostics import LayerDiagnostics
    from omega_qvla.evaluation.layer_drift import LayerDrift


@dataclass(frozen=True)
class DriftView:
    """`layer_drift(...)` of one arm. Arms of one family and variant share a heatmap, so
    give every arm the same layers where possible.
    """

    family: str
    variant: str
    arm: str
    drift: LayerDrift


@dataclass(frozen=True)
class LayerView:
    """`diagnose_layers(...)` under one arm's transform, best for one or two layers per side
    (`worst_layers(drift.local)` chooses them). `transform` names what happens in between.
    """

    family: str
    variant: str
    arm: str
    layers: tuple[LayerDiagnostics, ...]
    transform: str = "smoothing and rotation"


@dataclass(frozen=True)
class PairedEpisode:
    """One episode under several arms.

    traces: arm label -> `load_trace(out, arm.key, episode)`, reference first. Two arms make
    the paired video; with frames (episodes named in `run_evaluation(record=...)`) it is
    shown, without them only the action traces are.
    """

    family: str
    variant: str
    task: str
    seed: int
    traces: Mapping[str, Trace]


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows.

    summary:     `summarise(...)`.
    title:       headline of the page.
    featured:    the arm whose comparison with the reference comes first.
    reference:   label of the full-precision arm.
    arms:        arm label -> one line of plain words ("4-bit weights and activations,
                 nothing else"); shown under the headline table.
    families:    family -> display name ("pi0.5 architecture, 3.1 M parameters").
    variants:    variant -> display name ("with outlier channels").
    layer_drift: one entry per (family, variant, arm) to show.
    layer_views: activation ranges and channel magnitudes.
    episodes:    paired episodes to show.
    action_names: names of the action channels, in order ("dx", "dy", "dz", "gripper").
    environment: `environment()`.
    notes:       sentences on how it was measured (protocol, seeds, number of
                 observations behind the drift, calibration); shown as a list.
    command:     the command that repeats it.
    """

    summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
    title: str = "Quantized robot policies against their originals"
    featured: str = "omega"
    reference: str = REFERENCE
    arms: Mapping[str, str] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, str] = field(
        default_factory=lambda: {"plain": "as trained", "outliers": "with outlier channels"}
    )
    layer_drift: tuple[DriftView, ...] = ()
    layer_views: tuple[LayerView, ...] = ()
    episodes: tuple[PairedEpisode, ...] = ()
    action_names: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    command: str = ""

    def arm_labels(self) -> tuple[str, ...]:
        """Every arm of the report, in order of appearance, reference first."""
        seen: dict[str, None] = {self.reference: None}
        for variants in self.summary.values():
            for arms in variants.values():
                seen.update(dict.fromkeys(arms))
        seen.update(dict.fromkeys(view.arm for view in self.layer_drift))
        for episode in self.episodes:
            seen.update(dict.fromkeys(episode.traces))
        return tuple(seen)

    def group_name(self, family: str, variant: str) -> str:
        """Display name of a family and variant."""
        return f"{self.families.get(family, family)}, {self.variants.get(variant, variant)}"
