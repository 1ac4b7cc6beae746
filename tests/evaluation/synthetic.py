"""A report's worth of invented data, shaped like a demo's."""

from __future__ import annotations

import numpy as np

from omega_qvla.evaluation.diagnostics import ONCE, LayerDiagnostics, Range
from omega_qvla.evaluation.layer_drift import LayerDrift
from omega_qvla.evaluation.open_loop import chunk_drift
from omega_qvla.evaluation.records import ArmKey, EpisodeRecord, Trace
from omega_qvla.evaluation.report import DriftView, LayerView, PairedEpisode, ReportData
from omega_qvla.evaluation.summary import summarise

FAMILIES = {"pi05": 10, "groot_n15": 4}
#: arm -> (success plain, success with outliers, error of chunks, layer error)
ARMS = {
    "full-precision": (0.88, 0.88, 0.0, 0.0),
    "rtn": (0.80, 0.22, 0.5, 0.12),
    "omega-paper": (0.84, 0.7, 0.25, 0.04),
    "omega": (0.87, 0.86, 0.08, 0.01),
}
TASKS = ("button-press-topdown", "door-open", "drawer-close", "drawer-open")
_BACKBONE = "model.language_model.layers"
_HEAD = {"pi05": "model.gemma_expert.model.layers", "groot_n15": "action_head.model.blocks"}
_KINDS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def report_data(episodes: int = 40, blocks: int = 6) -> ReportData:
    rng = np.random.default_rng(0)
    records, drift, sizes = [], {}, {}
    for family in FAMILIES:
        for variant in ("plain", "outliers"):
            for arm, (plain, outliers, error, _) in ARMS.items():
                rate = plain if variant == "plain" else outliers
                key = ArmKey(family, variant, arm)
                records += [_record(rng, key, rate, i) for i in range(episodes)]
                sizes[key] = (2_900_000 if error else 10_800_000, 10_800_000)
                if error:
                    scale = error * (1.0 if variant == "plain" else 2.0)
                    chunks = rng.standard_normal((48, 10, 4))
                    moved = chunks + scale * rng.gamma(1, 1, (48, 1, 1)) * rng.standard_normal(
                        chunks.shape
                    )
                    drift[key] = chunk_drift(chunks, moved)
    return ReportData(
        summary=summarise(records, drift, sizes),
        arms={
            "full-precision": "the checkpoint as it is, 16-bit weights",
            "rtn": "naive W4A4: rounded to nearest, one scale per row and per token",
            "omega-paper": "the published recipe, emulated in floating point",
            "omega": "W4A4 on integers: smoothing, Hadamard rotation, GPTQ, scales per group",
        },
        families={"pi05": "π0.5 architecture", "groot_n15": "GR00T N1.5 architecture"},
        layer_drift=tuple(
            _drift_view(rng, family, variant, arm, blocks)
            for family in FAMILIES
            for variant in ("plain", "outliers")
            for arm in ("rtn", "omega-paper", "omega")
        ),
        layer_views=tuple(
            LayerView(family, "outliers", "omega", _layers(rng, family)) for family in FAMILIES
        ),
        episodes=tuple(_episode(rng, family) for family in FAMILIES),
        action_names=("dx", "dy", "dz", "gripper"),
        environment={"python": "3.11.2", "torch": "2.13.0", "cpu": "Some CPU <2 cores>"},
        notes=("40 episodes per arm.", "Drift on 48 held-out observations."),
        command="omega-qvla demo --out runs/demo",
    )


def _record(rng: np.random.Generator, key: ArmKey, rate: float, index: int) -> EpisodeRecord:
    success = bool(rng.random() < rate)
    steps = int(rng.integers(40, 120)) if success else 200
    jerk = 0.4 * (1.5 if key.arm == "rtn" else 1.0) * float(rng.uniform(0.8, 1.2))
    return EpisodeRecord(
        *key,
        TASKS[index % len(TASKS)],
        1_000_000 + index,
        success,
        steps,
        -(-steps // 5),
        jerk,
        jerk / 2,
        0.4,
        0.3,
        0.9,
    )


def _drift_view(
    rng: np.random.Generator, family: str, variant: str, arm: str, blocks: int
) -> DriftView:
    base = ARMS[arm][3] * (1 if variant == "plain" else 3)
    local, accumulated = {}, {}
    for block in range(blocks):
        for kind in _KINDS:
            hard = 3.0 if "down" in kind else 1.0
            once = base * hard * float(rng.lognormal(0, 0.5))
            local[f"{_BACKBONE}.{block}.{kind}"] = {ONCE: once}
            accumulated[f"{_BACKBONE}.{block}.{kind}"] = {ONCE: 2 * once}
            name = f"{_HEAD[family]}.{block}.{kind}"
            steps = range(FAMILIES[family])
            local[name] = {s: base * hard * float(rng.lognormal(s / 8, 0.3)) for s in steps}
            accumulated[name] = {s: value * (1 + s) for s, value in local[name].items()}
    return DriftView(family, variant, arm, LayerDrift(local, accumulated, FAMILIES[family]))


def _layers(rng: np.random.Generator, family: str) -> tuple[LayerDiagnostics, ...]:
    width = 192
    before = rng.gamma(9, 0.3, width)
    before[[17, 80, 141]] *= (60, 25, 40)
    after = rng.gamma(60, 0.08, width)
    growth = {s: 1 + s / 4 for s in range(FAMILIES[family])}
    big = {s: Range(-90 * g, -4 * g, 4.2 * g, 160 * g) for s, g in growth.items()}
    small = {s: Range(-8 * g, -5 * g, 5 * g, 8.4 * g) for s, g in growth.items()}
    once_big, once_small = {ONCE: Range(-80, -4, 4, 90)}, {ONCE: Range(-8, -5, 5, 8)}
    names = (f"{_HEAD[family]}.3.mlp.down_proj", f"{_BACKBONE}.2.self_attn.q_proj")
    return (
        LayerDiagnostics(names[0], "action_head", big, small, before, after),
        LayerDiagnostics(names[1], "backbone", once_big, once_small, before[::-1], after),
    )


def _episode(rng: np.random.Generator, family: str) -> PairedEpisode:
    traces = {}
    for arm, steps, success in (("full-precision", 70, True), ("omega", 83, True), ("rtn", 120, 0)):
        if family == "pi05" and arm == "rtn":
            continue
        xs = np.arange(steps)[:, None] / 12 + np.arange(4)
        actions = np.clip(np.sin(xs) + 0.1 * rng.standard_normal((steps, 4)), -1, 1)
        frame_steps = np.array([*range(0, steps, 3), steps])
        frames = np.zeros((len(frame_steps), 96, 96, 3), np.uint8)
        frames[..., 2] = 90
        for frame, step in zip(frames, frame_steps, strict=True):
            x = int(80 * step / 125)
            frame[40:56, x : x + 16] = (240, 200, 60)
        traces[arm] = Trace(
            actions.astype(np.float32), np.arange(0, steps, 5), frames, frame_steps, bool(success)
        )
    return PairedEpisode(family, "outliers", "drawer-open", 1_000_007, traces)
