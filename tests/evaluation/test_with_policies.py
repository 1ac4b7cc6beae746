"""The parts together, on the real families with random weights: what a demo does, in small."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.config.presets import preset
from omega_qvla.errors import EnvError
from omega_qvla.evaluation.diagnostics import ONCE, diagnose_layers, worst_layers
from omega_qvla.evaluation.executor import load_trace, run_evaluation
from omega_qvla.evaluation.layer_drift import layer_drift
from omega_qvla.evaluation.open_loop import action_drift
from omega_qvla.evaluation.plan import Plan, episodes
from omega_qvla.evaluation.records import REFERENCE, Arm, Protocol
from omega_qvla.evaluation.report import (
    DriftView,
    LayerView,
    PairedEpisode,
    ReportData,
    write_report,
)
from omega_qvla.evaluation.rollout import load_arm
from omega_qvla.evaluation.summary import summarise
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import save_policy
from omega_qvla.quantize import quantize_policy
from policies.tiny import IMAGE_SIZE, tiny_groot, tiny_observation, tiny_pi05

FAMILIES = {"pi05": tiny_pi05, "groot_n15": tiny_groot}


@pytest.fixture(scope="module", params=list(FAMILIES))
def arms(request, tmp_path_factory):
    """(full precision, rtn) as files, of either family."""
    folder = tmp_path_factory.mktemp(request.param)
    policy = FAMILIES[request.param]()
    checkpoint = save_policy(policy, folder / "checkpoint", dtype=torch.float32)
    pack = quantize_policy(policy, preset("rtn"), None, out=folder / "rtn.safetensors")
    return (
        Arm(REFERENCE, str(checkpoint), request.param),
        Arm("rtn", str(checkpoint), request.param, pack=str(pack)),
    )


@pytest.fixture(scope="module")
def measured(arms):
    """Drift of the arms, by action chunk and by layer, and the layers' inputs."""
    reference, quantized = (load_arm(arm) for arm in arms)
    layers = read_pack(arms[1].pack).layers
    seen, seeds = [tiny_observation(i) for i in range(3)], [7, 8, 9]
    drift = action_drift(reference, quantized, seen, seeds)
    by_layer = layer_drift(reference, quantized, seen, seeds, list(layers))
    shown = {name: layers[name] for name in worst_layers(by_layer.local, 2)}
    return reference, drift, by_layer, diagnose_layers(reference, seen, shown)


def test_drift_of_a_real_pack(arms, measured):
    reference, drift, by_layer, diagnostics = measured
    assert 0.0 < drift.cosine_min < 0.99999
    steps = set(range(reference.num_steps))
    independent = set(reference.step_independent_linears())
    for name, errors in by_layer.local.items():
        once = reference.side_of(name) == "backbone" or name in independent
        assert set(errors) == ({ONCE} if once else steps), name
        assert all(0 < error < 1 for error in errors.values()), name
    for layer in diagnostics:
        # rtn transforms nothing, so before and after are the same numbers.
        assert layer.ranges_before == layer.ranges_after


@pytest.mark.sim
def test_closed_loop_and_report(arms, measured, tmp_path):
    try:
        from omega_qvla.envs.rendering import import_mujoco

        import_mujoco()
    except (EnvError, ImportError) as error:
        pytest.skip(f"no simulator here: {error}")
    chosen = episodes(["drawer-open"], range(1_000_000, 1_000_002))
    plan = Plan(
        arms, chosen, Protocol(max_steps=10, frame_size=48), env_options={"size": IMAGE_SIZE}
    )
    out = tmp_path / "episodes.jsonl"
    records = run_evaluation(plan, out, workers=2, progress=False, record=chosen[:1])
    again = run_evaluation(plan, tmp_path / "again.jsonl", workers=0, progress=False)
    assert [r.outcome() for r in records] == [r.outcome() for r in again]
    assert all((r.steps, r.replans, r.error) == (10, 2, None) for r in records)
    assert all(min(r.simulation_s, r.rendering_s, r.policy_s) > 0 for r in records)

    _, drift, by_layer, diagnostics = measured
    family, variant, _ = arms[1].key
    sizes = read_pack(arms[1].pack).sizes()
    summary = summarise(
        records, {arms[1].key: drift}, {arms[1].key: (sizes.layer_bytes, sizes.layer_bytes_16bit)}
    )
    traces = {arm.label: load_trace(out, arm.key, chosen[0]) for arm in arms}
    assert all(len(trace.frames) == 5 for trace in traces.values())
    data = ReportData(
        summary,
        featured="rtn",
        layer_drift=(DriftView(family, variant, "rtn", by_layer),),
        layer_views=(LayerView(family, variant, "rtn", diagnostics, "no transform"),),
        episodes=(PairedEpisode(family, variant, *chosen[0], traces),),
    )
    page = write_report(data, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "image/webp" in page
    assert "drawer-open" in page
