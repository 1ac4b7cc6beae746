"""Train one demo policy by flow matching: resumable, with held-out validation.

    python training/train.py --family pi05 --data DIR --out RUN --minutes 90

The schedule follows training time, not a number of steps, so that a run fits the time
there is. `RUN/state.pt` holds everything that resuming needs; `RUN/log.jsonl` the losses.
Export the averaged weights with `training/export.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data import Demonstrations, load_demonstrations
from families import FAMILIES, Batch, Family, make_batch, make_family
from omega_qvla.files import atomic_file


@dataclass(frozen=True)
class Settings:
    """One training run. `minutes` of training time; `samples` noise draws per observation.

    shift: pictures are moved by up to so many pixels, at random.
    held_out_every: one episode in so many is for validation, which is left out while there is
    none.
    """

    family: str
    data: Path
    out: Path
    minutes: float
    batch: int = 64
    samples: int = 4
    shift: int = 4
    held_out_every: int = 25
    rate: float = 1e-3
    decay: float = 0.05
    average: float = 0.999
    seed: int = 0
    save_every: float = 120.0
    compiled: bool = False


def learning_rate(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to 1% of `peak`, over progress in [0, 1]."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    angle = math.pi * min(1.0, (progress - warmup) / (1 - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(angle)))


def make_optimizer(module: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) and embeddings are not decayed."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.decay}, {"params": plain}]
    return torch.optim.AdamW(
        groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )


class Averaged:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in module.parameters()]

    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module; early steps move faster."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], weight)

    def state(self) -> dict[str, torch.Tensor]:
        """Parameter name -> averaged value."""
        return dict(zip(self.names, self.values, strict=True))


class Run:
    """Everything that changes during training, and its file."""

    def __init__(self, settings: Settings, family: Family) -> None:
        self.settings, self.family = settings, family
        self.optimizer = make_optimizer(family.trainable, settings)
        self.average = Averaged(family.trainable, settings.average)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.elapsed = 0, 0.0
        settings.out.mkdir(parents=True, exist_ok=True)
        self.path = settings.out / "state.pt"
        if self.path.exists():
            self._restore(torch.load(self.path, weights_only=True))

    def _restore(self, state: dict[str, Any]) -> None:
        self.family.trainable.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for value, saved in zip(self.average.values, state["average"].values(), strict=True):
            value.copy_(saved)
        self.generator.set_state(state["generator"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def save(self) -> None:
        """Write the state atomically."""
        state = {
            "model": self.family.trainable.state_dict(),
            "average": self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "family": self.settings.family,
        }
        with atomic_file(self.path) as file:
            torch.save(state, file)

    def log(self, **values: float) -> None:
        """Append one line to the log."""
        record = {"step": self.step, "minutes": round(self.elapsed / 60, 2), **values}
        with (self.settings.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; returns (flow loss, auxiliary loss)."""
        progress = self.elapsed / (60 * self.settings.minutes)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.settings.rate)
        flow, auxiliary = self.family.losses(batch, self.settings.samples, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        (flow + self.family.auxiliary_weight * auxiliary).backward()
        nn.utils.clip_grad_norm_(self.family.trainable.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.family.trainable, self.step)
        return float(flow.detach()), float(auxiliary.detach())


def validate(run: Run, demos: Demonstrations, rows: torch.Tensor) -> float:
    """Mean flow loss on held-out episodes, averaged weights, fixed noise."""
    module = run.family.trainable
    current = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), run.average.values, strict=True):
            parameter.copy_(value)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for part in rows.split(64):
            batch = make_batch(demos, part, run.family, None)
            losses.append(float(run.family.losses(batch, 4, generator)[0]))
        for parameter, value in zip(module.parameters(), current, strict=True):
            parameter.copy_(value)
    return sum(losses) / len(losses)


def train(settings: Settings) -> None:
    """Train until `settings.minutes` of training time have passed, saving as it goes."""
    horizon = FAMILIES[settings.family].horizon
    demos = load_demonstrations(settings.data, horizon, settings.held_out_every)
    family = make_family(settings.family, demos, settings.seed, settings.compiled)
    run = Run(settings, family)
    training = torch.from_numpy((~demos.held_out).nonzero()[0])
    held_out = torch.from_numpy(demos.held_out.nonzero()[0])
    if len(held_out):
        held_out = held_out[torch.linspace(0, len(held_out) - 1, 256).long()]
    total = 60 * settings.minutes
    saved, flow_mean, auxiliary_mean = run.elapsed, 0.0, 0.0
    bar = tqdm(total=round(total), initial=round(run.elapsed), unit="s", mininterval=5)
    while run.elapsed < total:
        start = time.perf_counter()
        rows = torch.randint(len(training), (settings.batch,), generator=run.generator)
        batch = make_batch(demos, training[rows], family, run.generator, settings.shift)
        flow, auxiliary = run.train_step(batch)
        weight = max(0.02, 1 / run.step)
        flow_mean += weight * (flow - flow_mean)
        auxiliary_mean += weight * (auxiliary - auxiliary_mean)
        run.elapsed += time.perf_counter() - start
        bar.update(round(run.elapsed) - bar.n)
        if run.elapsed - saved > settings.save_every or run.elapsed >= total:
            saved = run.elapsed
            run.save()
            values = {"flow": flow_mean, "auxiliary": auxiliary_mean}
            if len(held_out):
                values["held_out"] = validate(run, demos, held_out)
            run.log(**values)
            bar.set_postfix(step=run.step, **values)
    bar.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--shift", type=int, default=4, help="augmentation, pixels")
    parser.add_argument("--held-out-every", type=int, default=25, help="episodes")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="torch.compile the loss")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    train(Settings(**args))


if __name__ == "__main__":
    main()
