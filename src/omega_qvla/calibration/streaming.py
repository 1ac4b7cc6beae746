"""Calibration of a network that is never in memory as a whole, nor are its statistics.

All observations go through the network together, stage by stage (`policies.base.Stage`): the
weights of a stage are loaded, every observation runs through it, the statistics of its layers
are handed out, and both are dropped before the next stage. The action head's blocks run once
per denoising step and depend on one another across steps, so there the calls of each block
are kept (its inputs, which are small) and repeated block by block with observers.

Statistics are those of `collect`, bit for bit: the same code runs on the same inputs in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omega_qvla.calibration.collect import Progress, linears, noise_seed
from omega_qvla.calibration.lockstep import Body, Lockstep, Mark, lockstep
from omega_qvla.calibration.observers import InputObserver
from omega_qvla.errors import CalibrationError
from omega_qvla.modules.step_context import Step, current_step, denoising_step
from omega_qvla.numerics.phases import phase
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.policies.base import SAMPLING, Policy, Stage
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.weights import Weights


@dataclass(frozen=True)
class _Call:
    """One call of a block by observation number `observation`."""

    observation: int
    step: Step
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass
class _Recorder:
    """Keeps the calls of blocks that the denoising steps make."""

    blocks: Mapping[str, nn.Module]
    calls: dict[str, list[_Call]] = field(default_factory=dict)

    @contextmanager
    def watching(self, observation: int) -> Iterator[None]:
        """Keep the calls that the body makes for observation number `observation`."""
        with ExitStack() as stack:
            for name, block in self.blocks.items():
                hook = self._hook(name, observation)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, name: str, observation: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            step = current_step()
            if step is None:
                raise CalibrationError(f"block {name} ran outside the denoising steps")
            call = _Call(observation, step, arguments, dict(named))
            self.calls.setdefault(name, []).append(call)

        return hook


@dataclass(frozen=True)
class _Work:
    """What is wanted of one stage: layers watched as it runs, and layers of its blocks."""

    stage: Stage
    direct: tuple[str, ...]
    blocks: Mapping[str, tuple[str, ...]]

    @property
    def empty(self) -> bool:
        return not self.direct and not self.blocks


def stream(
    policy: Policy,
    weights: Weights,
    observations: Sequence[Observation],
    layer_names: Sequence[str],
    *,
    num_steps: int | None = None,
    token_cap: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[dict[str, LayerStats]]:
    """Statistics of the inputs of the named linears, those of one stage or block at a time.

    What is yielded is for the caller to use and drop before it asks for more; meanwhile the
    weights of those layers are loaded. Arguments and statistics as of `collect`; `progress`
    counts observations times stages.

    Raises:
        CalibrationError, ObservationError: as `collect`; a layer that is in no stage.
    """
    steps = policy.num_steps if num_steps is None else num_steps
    chosen = list(observations)
    if not chosen or token_cap < 1:
        raise CalibrationError(
            f"calibration takes observations and a token cap of at least 1; got {len(chosen)} "
            f"and {token_cap}"
        )
    work = _plan(policy, layer_names)
    modules = linears(policy.module, layer_names)
    report = progress if progress is not None else _silent

    def observer(names: Sequence[str]) -> InputObserver:
        return InputObserver(
            {name: modules[name] for name in names},
            num_steps=steps,
            token_cap=token_cap,
            observations=len(chosen),
            seed=seed,
        )

    bodies = [_inference(policy, o, noise_seed(seed, i), steps) for i, o in enumerate(chosen)]
    entries = [item.stage.entry for item in work[1:]]
    with lockstep(policy.module, bodies, entries) as together:
        for index, item in enumerate(work):
            until = entries[index] if index < len(entries) else None
            recorder = _Recorder({n: policy.module.get_submodule(n) for n in item.blocks})
            with weights.loaded(item.stage.parts):
                watch = observer(item.direct)
                for i in range(len(chosen)):
                    _run_stage(together, i, until, watch, recorder)
                    report(index * len(chosen) + i + 1, len(work) * len(chosen))
                if item.direct:
                    yield watch.finish()
            del watch
            for name, layers in item.blocks.items():
                with weights.loaded((name,)):
                    yield _repeat(policy.module, name, recorder, observer(layers))


def _plan(policy: Policy, layer_names: Sequence[str]) -> list[_Work]:
    """The stages up to the last that is needed, with the layers wanted of each.

    Raises:
        CalibrationError: a layer that is in no stage.
    """
    outside = set(policy.step_independent_linears())
    work: list[_Work] = []
    left = list(layer_names)
    for stage in policy.stages():
        mine = [name for name in left if _within(name, stage.parts)]
        left = [name for name in left if name not in set(mine)]
        blocks: dict[str, tuple[str, ...]] = {}
        for block in stage.blocks:
            inside = tuple(n for n in mine if _within(n, (block,)) and n not in outside)
            blocks |= {block: inside} if inside else {}
        repeated = {name for names in blocks.values() for name in names}
        direct = tuple(name for name in mine if name not in repeated)
        work.append(_Work(stage, direct, blocks))
    if left:
        raise CalibrationError(
            f"layer {left[0]} runs in no stage of an inference; leave it out of the recipe"
        )
    while work and work[-1].empty:
        work.pop()
    return work


def _within(name: str, parts: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _inference(policy: Policy, observation: Observation, noise: int, steps: int) -> Body:
    def body(mark: Mark) -> None:
        with torch.no_grad():
            inputs = policy.prepare([observation])
            drawn = policy.draw_noise(1, noise)
            prefix = policy.encode(inputs)
            mark(SAMPLING)
            policy.sample(prefix, drawn, steps)

    return body


def _run_stage(
    together: Lockstep, index: int, until: str | None, watch: InputObserver, recorder: _Recorder
) -> None:
    with phase("collect"), watch.watching(index), recorder.watching(index):
        together.advance(index, until)


def _repeat(
    module: nn.Module, name: str, recorder: _Recorder, watch: InputObserver
) -> dict[str, LayerStats]:
    """Run a block's calls again, its layers watched, and forget them."""
    block = module.get_submodule(name)
    with phase("collect"), torch.no_grad():
        for call in recorder.calls.pop(name, []):
            with watch.watching(call.observation), denoising_step(call.step.index, call.step.total):
                block(*call.arguments, **call.named)
        return watch.finish()


def _silent(done: int, total: int) -> None:
    """Report to nobody."""
