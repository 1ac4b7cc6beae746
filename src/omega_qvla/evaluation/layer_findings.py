"""Everything about every layer of a pack in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omega_qvla.evaluation.diagnostics import LayerDiagnostics, Range, diagnose_layers
from omega_qvla.evaluation.layer_drift import LayerDrift
from omega_qvla.evaluation.sensitivity import Sensitivity, extra_bytes
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy

#: Layers whose inputs are held in memory at once.
PER_PASS = 8


@dataclass(frozen=True)
class LayerFinding:
    """One layer.

    error:       NMSE of its output on its own inputs, mean over the denoising steps;
    worst_error: the same in its worst step (`worst_step`, -1 outside the loop).
    accumulated: NMSE against the full-precision run, mean over the steps.
    largest, bulk: step -> largest |x| and the larger of the 1st and 99th percentile.
    ratio_before, ratio_after: largest channel over the median one, before and after the
                 change of basis.
    clip_rate:   share of entries beyond the integers' range, mean over the steps.
    alone, without: relative error of the chunks with only this layer quantized, and with all
                 but it; None where that was not measured.
    extra_bytes: what leaving it in 16 bits would cost.
    """

    name: str
    side: str
    error: float
    worst_error: float
    worst_step: int
    accumulated: float
    largest: Mapping[int, float]
    bulk: Mapping[int, float]
    ratio_before: float
    ratio_after: float
    clip_rate: float
    alone: float | None
    without: float | None
    layer_bytes: int
    extra_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; infinities as None."""
        plain = dict(vars(self))
        for key, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[key] = None
            elif isinstance(value, Mapping):
                plain[key] = {str(step): v for step, v in value.items()}
        return plain


def find_layers(
    policy: Policy,
    layers: Mapping[str, QuantizedLayer],
    observations: Sequence[Observation],
    seeds: Sequence[int],
    drift: LayerDrift,
    sensitivity: Sensitivity | None,
) -> tuple[LayerFinding, ...]:
    """A finding per layer of a pack, in its order.

    Args:
        policy: the full-precision one, whose inputs are looked at.
        drift: `layer_drift(...)` of the same layers.

    Raises:
        EvaluationError: a layer does not exist or never ran.
    """
    found = []
    for part in _parts(layers):
        looks = diagnose_layers(policy, observations, part, seeds=seeds)
        found += [_finding(look, layers[look.name], drift, sensitivity) for look in looks]
    return tuple(found)


def _parts(layers: Mapping[str, QuantizedLayer]) -> Iterator[dict[str, QuantizedLayer]]:
    names = list(layers)
    for start in range(0, len(names), PER_PASS):
        yield {name: layers[name] for name in names[start : start + PER_PASS]}


def _finding(
    look: LayerDiagnostics,
    layer: QuantizedLayer,
    drift: LayerDrift,
    sensitivity: Sensitivity | None,
) -> LayerFinding:
    local = drift.local[look.name]
    worst = max(local, key=lambda step: local[step])
    return LayerFinding(
        name=look.name,
        side=look.side,
        error=_mean(local),
        worst_error=local[worst],
        worst_step=worst,
        accumulated=_mean(drift.accumulated[look.name]),
        largest={step: _largest(r) for step, r in look.ranges_before.items()},
        bulk={step: max(abs(r.p01), abs(r.p99)) for step, r in look.ranges_before.items()},
        ratio_before=look.ratio_before,
        ratio_after=look.ratio_after,
        clip_rate=_mean(look.clip_rates),
        alone=sensitivity.alone[look.name] if sensitivity else None,
        without=sensitivity.without[look.name] if sensitivity else None,
        layer_bytes=layer.nbytes,
        extra_bytes=extra_bytes(layer),
    )


def _largest(values: Range) -> float:
    return max(abs(values.low), abs(values.high))


def _mean(values: Mapping[int, float]) -> float:
    return math.fsum(values.values()) / len(values)
