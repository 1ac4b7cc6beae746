"""Which layers the drift of the actions comes from, found by quantizing them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from omega_qvla.evaluation.layer_drift import submodule
from omega_qvla.evaluation.open_loop import Drift, chunk_drift, predict_chunks
from omega_qvla.modules.linear import replace_linears
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """Relative error of the action chunks (norm over norm) under parts of a pack.

    everything: all layers quantized.
    alone:      layer -> with this one quantized and no other.
    without:    layer -> with all but this one quantized.
    """

    everything: float
    alone: Mapping[str, float]
    without: Mapping[str, float]

    def gain(self, name: str) -> float:
        """Share of the error's energy that goes when this layer is left in full precision.

        Negative where its error happens to cancel others'.
        """
        if self.everything == 0:
            return 0.0
        return 1.0 - (self.without[name] / self.everything) ** 2


@dataclass(frozen=True)
class LeaveOut:
    """A set of layers left in 16 bits, and what that changes.

    error: relative error of the chunks.  cosine_median, cosine_min: of the chunks.
    extra_bytes: by which the policy's layers grow.
    """

    layers: tuple[str, ...]
    error: float
    cosine_median: float
    cosine_min: float
    extra_bytes: int


class PartialPolicy:
    """A policy in which any of a pack's layers can be switched on; see `partial_policy`."""

    def __init__(
        self,
        policy: Policy,
        layers: Mapping[str, QuantizedLayer],
        observations: Sequence[Observation],
        seeds: Sequence[int],
        backend: str = "auto",
    ) -> None:
        self._policy, self._observations, self._seeds = policy, observations, seeds
        self._linears: dict[str, nn.Module] = {n: submodule(policy, n) for n in layers}
        self._expected = predict_chunks(policy, observations, seeds)
        replace_linears(policy.module, layers, backend)
        self._quantized: dict[str, nn.Module] = {n: submodule(policy, n) for n in layers}
        self.layers = layers

    def drift(self, names: Collection[str]) -> Drift:
        """Drift of the chunks with exactly these layers quantized."""
        self._switch(set(names))
        return chunk_drift(
            self._expected, predict_chunks(self._policy, self._observations, self._seeds)
        )

    def restore(self) -> None:
        """Full precision everywhere."""
        self._switch(set())

    def _switch(self, names: set[str]) -> None:
        for name, linear in self._linears.items():
            parent, _, child = name.rpartition(".")
            module = self._quantized[name] if name in names else linear
            setattr(self._policy.module.get_submodule(parent), child, module)


@contextmanager
def partial_policy(
    policy: Policy,
    layers: Mapping[str, QuantizedLayer],
    observations: Sequence[Observation],
    seeds: Sequence[int],
    backend: str = "auto",
) -> Iterator[PartialPolicy]:
    """A full-precision `policy` whose `layers` can be quantized one by one; whole again after.

    Raises:
        EvaluationError, PackError: a layer does not exist or has another shape.
        BackendError: the backend cannot run a layer.
    """
    partial = PartialPolicy(policy, layers, observations, seeds, backend)
    try:
        yield partial
    finally:
        partial.restore()


def sensitivity(partial: PartialPolicy, progress: Tick | None = None) -> Sensitivity:
    """Quantize every layer alone, and all but it: twice as many runs as there are layers."""
    names = list(partial.layers)
    everything = partial.drift(names).relative_error
    alone, without = {}, {}
    for done, name in enumerate(names, start=1):
        alone[name] = partial.drift([name]).relative_error
        without[name] = partial.drift([n for n in names if n != name]).relative_error
        if progress is not None:
            progress(done, len(names))
    return Sensitivity(everything, alone, without)


def leave_out_curve(
    partial: PartialPolicy, found: Sensitivity, counts: Sequence[int] = (1, 2, 4, 8, 16)
) -> tuple[LeaveOut, ...]:
    """What leaving out more and more layers brings, measured; the first entry leaves out none.

    Layers go in the order of the error energy that they cause alone, per byte that leaving them
    out costs. `gain` would be the nearer measure, but it is a small difference of two large
    errors that cancel differently every time: on few observations it is mostly noise.
    """
    extra = {name: extra_bytes(layer) for name, layer in partial.layers.items()}
    order = sorted(partial.layers, key=lambda name: -(found.alone[name] ** 2) / extra[name])
    curve = []
    for count in sorted({0, *(n for n in counts if n <= len(order))}):
        left = tuple(order[:count])
        drift = partial.drift([name for name in partial.layers if name not in left])
        curve.append(
            LeaveOut(
                left,
                drift.relative_error,
                drift.cosine_median,
                drift.cosine_min,
                sum(extra[name] for name in left),
            )
        )
    return tuple(curve)


def extra_bytes(layer: QuantizedLayer) -> int:
    """Bytes that a layer takes in 16 bits beyond what it takes quantized (at least 1)."""
    full = 2 * layer.out_features * (layer.in_features + (layer.bias is not None))
    return max(1, full - layer.nbytes)


def suggest(curve: Sequence[LeaveOut], worth: float = 0.1) -> LeaveOut:
    """The entry of a curve to take: as long as the next one pays for its bytes.

    A step pays if it removes at least the share `worth` of the error that is left. The first
    entry (nothing left out) is the answer where no step does.
    """
    chosen = curve[0]
    for entry in curve[1:]:
        if entry.error > (1 - worth) * chosen.error:
            break
        chosen = entry
    return chosen
