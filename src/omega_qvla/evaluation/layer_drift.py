"""Where the drift comes from: the error of every quantized layer in every denoising step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.open_loop import batches
from omega_qvla.modules.step_context import current_step
from omega_qvla.policies.observation import Observation

if TYPE_CHECKING:
    from omega_qvla.policies.base import Policy

#: Step key of layers that run outside the denoising loop.
ONCE = -1

#: layer -> step (or `ONCE`) -> NMSE.
Errors = dict[str, dict[int, float]]


@dataclass(frozen=True)
class LayerDrift:
    """Normalised mean squared error (error energy over output energy) by layer and step.

    local:       each layer on the inputs it gets in the quantized run, against the full
                 precision layer on the same inputs: what this layer adds.
    accumulated: outputs of the quantized run against those of the full-precision run:
                 what all layers (and steps) before it have added up to.
    num_steps:   denoising steps; layers outside the loop have the one key `ONCE`.
    """

    local: Errors
    accumulated: Errors
    num_steps: int


def layer_drift(
    reference: Policy,
    policy: Policy,
    observations: Sequence[Observation],
    seeds: Sequence[int],
    layers: Sequence[str],
    *,
    batch: int = 4,
) -> LayerDrift:
    """Run both policies on the same observations and noise, and compare layer by layer.

    `layers` are qualified module names that exist in both (linear in `reference`,
    quantized in `policy`). Both runs follow their own denoising trajectory from the
    same noise. Memory: the outputs of `layers` for one batch.

    Raises:
        EvaluationError: a layer is missing, or ran a different number of times.
    """
    local, accumulated = _Energies(), _Energies()
    linears = {name: submodule(reference, name) for name in layers}
    for (inputs, noise), (inputs_q, _) in zip(
        batches(reference, observations, seeds, batch),
        batches(policy, observations, seeds, batch),
        strict=True,
    ):
        outputs: dict[str, list[Tensor]] = defaultdict(list)

        def keep(
            name: str, _: Tensor, output: Tensor, outputs: dict[str, list[Tensor]] = outputs
        ) -> None:
            outputs[name].append(output)

        with hooked(reference, layers, keep), torch.inference_mode():
            reference.sample(reference.encode(inputs), noise)

        def compare(
            name: str, x: Tensor, output: Tensor, outputs: dict[str, list[Tensor]] = outputs
        ) -> None:
            local.add(name, linears[name].forward(x), output)
            if not outputs[name]:
                raise EvaluationError(f"{name} runs more often in the quantized policy")
            accumulated.add(name, outputs[name].pop(0), output)

        with hooked(policy, layers, compare), torch.inference_mode():
            policy.sample(policy.encode(inputs_q), noise)
        left = sorted(name for name, values in outputs.items() if values)
        if left:
            raise EvaluationError(f"{left[0]} runs less often in the quantized policy")
    return LayerDrift(local.nmse(), accumulated.nmse(), reference.num_steps)


def submodule(policy: Policy, name: str) -> Any:
    """A module of the policy by its qualified name (EvaluationError if there is none)."""
    try:
        return policy.module.get_submodule(name)
    except AttributeError as error:
        raise EvaluationError(f"the {policy.family} policy has no layer {name!r}") from error


@contextmanager
def hooked(
    policy: Policy, layers: Sequence[str], visit: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `visit(name, input, output)` after each forward of `layers`."""
    with ExitStack() as stack:
        for name in layers:

            def hook(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                visit(name, args[0], output)

            handle = submodule(policy, name).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def step_key() -> int:
    """Index of the running denoising step, or `ONCE`."""
    step = current_step()
    return ONCE if step is None else step.index


class _Energies:
    """Sums of squared errors and squared outputs by (layer, step)."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, list[float]]] = defaultdict(dict)

    def add(self, name: str, reference: Tensor, output: Tensor) -> None:
        ref, out = reference.double(), output.double()
        sums = self._sums[name].setdefault(step_key(), [0.0, 0.0])
        sums[0] += float(((out - ref) ** 2).sum())
        sums[1] += float((ref**2).sum())

    def nmse(self) -> Errors:
        return {
            name: {step: error / max(energy, 1e-30) for step, (error, energy) in sorted(s.items())}
            for name, s in self._sums.items()
        }
