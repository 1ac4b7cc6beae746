"""Watching the inputs of linear layers while a policy runs.

Nothing is kept whole: per layer a running X^T X, the robust channel energies, and per
denoising step a capped sample of tokens. Layers fed by one tensor (q, k and v; gate and up;
the cross-attention keys and values of all blocks) are one group with one set of statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.errors import CalibrationError
from omega_qvla.modules.step_context import current_step
from omega_qvla.numerics.phases import phase
from omega_qvla.numerics.smoothing import robust_energy
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.numerics.symmetric import add_gram_, mirror_

_PENDING = 2048  # tokens per product of the Hessian
OUTSIDE = -1  # the key of everything that runs outside the denoising steps


@dataclass
class _Group:
    """What is accumulated for one input tensor and the layers that read it.

    Tokens wait in `pending` until there are enough for an efficient product; the Hessian's
    upper triangle is all that is summed.
    """

    hessian: Tensor
    energy: Tensor
    energy_count: int = 0
    count: int = 0
    pending: list[Tensor] = field(default_factory=list)
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _Group:
        hessian = torch.zeros(width, width, dtype=torch.float32, device=device)
        return cls(hessian, torch.zeros(width, dtype=torch.float64, device=device))

    def add(self, x: Tensor) -> None:
        """Account for tokens x [n, in], in the dtype of the layer's input."""
        energy, counted = robust_energy(x.float())
        self.energy += energy
        self.energy_count += counted
        self.count += len(x)
        self.pending.append(x.clone())
        if sum(map(len, self.pending)) >= _PENDING:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        x = torch.cat(self.pending)
        self.pending.clear()
        with phase("hessian"), exact_products(x.dtype):
            add_gram_(self.hessian, x.float())

    def stats(self, steps: list[int]) -> LayerStats:
        """The statistics, on the CPU, with one tensor of tokens per entry of `steps`; once."""
        self._flush()
        profile = (self.energy.cpu() / max(self.energy_count, 1)).sqrt().to(torch.float32)
        return LayerStats(
            hessian=mirror_(self.hessian.cpu().div_(self.count), to="lower"),
            profile=profile,
            tokens=tuple(torch.cat(self.tokens[step]).float().cpu() for step in steps),
            count=self.count,
        )


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products on the CPU of values that are bfloat16 anyway run as such.

    Each product of two bfloat16 numbers is exact in float32 and sums stay in float32, so
    nothing is lost, and processors with bfloat16 instructions are twice as fast.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        if dtype == torch.bfloat16:
            settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before


class InputObserver:
    """Collects the statistics of the inputs of `modules` while they are `watching()`.

    Args:
        modules: layer name -> the linear to watch.
        num_steps: how many denoising steps a trajectory must have.
        token_cap: tokens kept per (layer, step), shared out evenly over `observations`.
        observations: how many observations will be run.
        seed: chooses the kept tokens, by (seed, observation, step) alone, so the choice does
            not depend on which other layers are watched.
        share: give layers that read one tensor one set of statistics. False for code that
            may call a layer in several places, with its neighbours in one and without in another.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        num_steps: int,
        token_cap: int,
        observations: int,
        seed: int,
        share: bool = True,
    ) -> None:
        self._modules, self._share = dict(modules), share
        self._num_steps = num_steps
        self._cap, self._total, self._seed = token_cap, observations, seed
        self._groups: dict[str, _Group] = {}
        self._leader: dict[str, str] = {}
        self._calls: dict[str, int] = dict.fromkeys(modules, 0)
        self._last: tuple[Tensor, str] | None = None
        self._observation = 0
        self._kept: dict[tuple[str, int], int] = {}

    @contextmanager
    def watching(self, observation: int) -> Iterator[None]:
        """Watch while the body runs the policy on observation number `observation`."""
        self._observation = observation
        self._kept.clear()
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            x = arguments[0] if arguments else named["input"]
            with torch.autocast(x.device.type, enabled=False):  # statistics are of full precision
                self._see(name, x)

        return hook

    def _see(self, name: str, x: Tensor) -> None:
        self._calls[name] += 1
        shared = self._share and self._last is not None and self._last[0] is x
        if self._last is not None and shared:
            leader = self._leader.setdefault(name, self._last[1])
            if leader == self._last[1] and leader != name:
                return
        if self._leader.setdefault(name, name) != name:
            raise CalibrationError(
                f"layer {name} shares its input with {self._leader[name]} in one call but not in "
                "another; its statistics would be wrong"
            )
        self._last = (x, name)
        self._accumulate(name, x)

    def _accumulate(self, name: str, x: Tensor) -> None:
        step = current_step()
        where = "outside the denoising steps" if step is None else f"in step {step.index}"
        if step is not None and step.total != self._num_steps:
            raise CalibrationError(
                f"layer {name}: ran in a trajectory of {step.total} denoising steps; the "
                f"calibration is for {self._num_steps}"
            )
        tokens = x.detach().reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(tokens).all()):
            raise CalibrationError(
                f"layer {name}: non-finite input {where}, observation {self._observation}; "
                "leave that observation out or mend the checkpoint"
            )
        if name not in self._groups:
            self._groups[name] = _Group.empty(tokens.shape[1], tokens.device)
        group = self._groups[name]
        group.add(tokens)
        key = OUTSIDE if step is None else step.index
        keep = self._keep(name, key, len(tokens))
        kept = tokens if len(keep) == len(tokens) else tokens[keep.to(tokens.device)]
        group.tokens.setdefault(key, []).append(kept.clone())

    def _keep(self, name: str, key: int, count: int) -> Tensor:
        """Indices of the tokens to keep: this observation's share of the cap, seeded."""
        i, total = self._observation, self._total
        share = (i + 1) * self._cap // total - i * self._cap // total
        left = share - self._kept.get((name, key), 0)
        number = min(count, left)
        self._kept[name, key] = share - left + number
        rng = np.random.default_rng([self._seed, i, key + 1])
        return torch.from_numpy(np.sort(rng.permutation(count)[:number]))

    def finish(self) -> dict[str, LayerStats]:
        """Statistics per layer; layers of one group share one object.

        Raises:
            CalibrationError: a layer never ran, missed a step, or ran both inside and outside
                the denoising steps; each named.
        """
        silent = [name for name, calls in self._calls.items() if calls == 0]
        if silent:
            raise CalibrationError(
                f"{len(silent)} layer(s) never ran during calibration, first {silent[0]}; leave "
                "them out of the recipe"
            )
        for name, leader in self._leader.items():
            if self._calls[name] != self._calls[leader]:
                raise CalibrationError(
                    f"layer {name} ran {self._calls[name]} times but {leader}, whose input it "
                    f"shares, {self._calls[leader]} times; its statistics would be wrong"
                )
        made = {name: group.stats(self._steps(name)) for name, group in self._groups.items()}
        return {name: made[self._leader[name]] for name in self._modules}

    def _steps(self, name: str) -> list[int]:
        seen = self._groups[name].tokens
        if set(seen) == {OUTSIDE}:
            return [OUTSIDE]
        if OUTSIDE in seen:
            raise CalibrationError(
                f"layer {name} runs both inside and outside the denoising steps; it cannot have "
                "one table of scales"
            )
        missing = [step for step in range(self._num_steps) if step not in seen]
        if missing:
            raise CalibrationError(
                f"layer {name}: calibration misses denoising step(s) "
                f"{', '.join(map(str, missing))} of {self._num_steps}"
            )
        return list(range(self._num_steps))
