import numpy as np
import pytest
import torch

from omega_qvla.errors import ActionError, EvaluationError
from omega_qvla.evaluation.diagnostics import ONCE, diagnose_layers, worst_layers
from omega_qvla.evaluation.layer_drift import layer_drift
from omega_qvla.evaluation.open_loop import action_drift, chunk_drift, predict_chunks

from .toy import LAYERS, ToyPolicy, observations, quantized

SEEDS = list(range(10))


@pytest.fixture(scope="module")
def policy():
    return ToyPolicy()


@pytest.fixture(scope="module")
def twin(policy):
    return quantized(policy)


def test_chunk_drift_by_hand():
    reference = np.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
    moved = np.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 2.0], [0.0, 0.0]]])
    drift = chunk_drift(reference, moved)
    half = np.sqrt(0.5)
    assert drift.cosine_mean == pytest.approx((1 + half) / 2)
    assert drift.cosine_median == pytest.approx((1 + half) / 2)
    assert drift.cosine_min == pytest.approx(half)
    assert drift.channel_nmse == pytest.approx((0.0, 4.0))
    assert drift.worst_channel == 1
    assert drift.relative_error == pytest.approx(np.sqrt(4 / 6))
    assert drift.count == 2


def test_chunk_drift_of_nothing_moving():
    zeros = np.zeros((2, 3, 4))
    same = chunk_drift(zeros, zeros)
    assert (same.cosine_min, same.relative_error) == (1.0, 0.0)
    moved = chunk_drift(zeros, zeros + 1)
    assert moved.cosine_min == 0.0
    assert moved.channel_nmse[0] == np.inf
    with pytest.raises(EvaluationError, match="shapes"):
        chunk_drift(zeros, zeros[:1])


def test_chunks_do_not_depend_on_the_batch(policy):
    seen = observations(10)
    alone = predict_chunks(policy, seen, SEEDS, batch=1)
    assert alone.shape == (10, 6, 3)
    np.testing.assert_allclose(predict_chunks(policy, seen, SEEDS, batch=4), alone, atol=1e-5)
    with pytest.raises(EvaluationError, match="seeds"):
        predict_chunks(policy, seen, SEEDS[:3])


def test_a_non_finite_chunk_is_named(policy):
    seen = observations(5)
    seen[3].state[0] = np.nan
    with pytest.raises(ActionError, match="observation 3"):
        predict_chunks(policy, seen, SEEDS[:5], batch=2)


def test_a_policy_does_not_drift_from_itself_but_its_4_bit_twin_does(policy, twin):
    seen = observations(10)
    assert action_drift(policy, policy, seen, SEEDS).cosine_min == pytest.approx(1.0)
    drift = action_drift(policy, twin[0], seen, SEEDS)
    assert 0.5 < drift.cosine_min < 0.9999


def test_layer_drift_by_layer_and_step(policy, twin):
    drift = layer_drift(policy, twin[0], observations(10), SEEDS, list(LAYERS), batch=4)
    assert set(drift.local["backbone.fc"]) == {ONCE}
    assert list(drift.local["head.fc"]) == [0, 1, 2, 3]
    # The backbone has nothing before it: its local error is its accumulated one.
    assert drift.local["backbone.fc"][ONCE] == pytest.approx(
        drift.accumulated["backbone.fc"][ONCE], rel=1e-6
    )
    # The head inherits the error of the backbone, and its own.
    assert drift.accumulated["head.fc"][3] > drift.local["head.fc"][3] > 1e-3
    linear = policy.module.get_submodule("backbone.fc")
    x = policy.prepare(observations(10))
    with torch.no_grad():
        expected, got = linear(x), twin[0].module.get_submodule("backbone.fc")(x)
    nmse = float(((got - expected) ** 2).sum() / (expected**2).sum())
    assert drift.local["backbone.fc"][ONCE] == pytest.approx(nmse, rel=1e-4)
    assert worst_layers({"a": {0: 0.1, 1: 0.3}, "b": {0: 0.25}, "c": {0: 0.1}}, 2) == ["b", "a"]


def test_layer_drift_leaves_no_hooks_and_names_missing_layers(policy, twin):
    layer_drift(policy, twin[0], observations(2), SEEDS[:2], list(LAYERS))
    for side in (policy, twin[0]):
        assert not any(module._forward_hooks for module in side.module.modules())
    with pytest.raises(EvaluationError, match=r"head\.nothing"):
        layer_drift(policy, twin[0], observations(2), SEEDS[:2], ["head.nothing"])


def test_diagnostics_see_outliers_go_away_under_rotation():
    policy = ToyPolicy()
    policy.outlier[5] = 50.0
    _, layers = quantized(policy)
    seen = observations(12)
    (backbone, head) = diagnose_layers(policy, seen, _rotated(layers))
    assert (backbone.name, backbone.side) == ("backbone.fc", "backbone")
    assert set(backbone.ranges_before) == {ONCE}
    assert list(head.ranges_before) == list(head.ranges_after) == [0, 1, 2, 3]
    states = np.stack([o.state for o in seen])
    states[:, 5] *= 50
    np.testing.assert_allclose(backbone.channels_before, np.abs(states).max(0), rtol=1e-6)
    assert backbone.ranges_before[ONCE].high == pytest.approx(states.max())
    assert backbone.ratio_before > 20
    assert backbone.ratio_after < 3
    # The head's inputs grow with the step by construction of the toy.
    assert head.ranges_before[3].high > 2 * head.ranges_before[0].high


def _rotated(layers):
    from dataclasses import replace

    from omega_qvla.config.recipe import Rotation

    return {
        name: replace(layer, scheme=replace(layer.scheme, rotation=Rotation("hadamard", 64)))
        for name, layer in layers.items()
    }


def test_a_layer_that_never_runs_cannot_be_diagnosed(policy, twin):
    policy.module["idle"] = torch.nn.Linear(64, 64)
    try:
        with pytest.raises(EvaluationError, match="never ran"):
            diagnose_layers(policy, observations(2), {"idle": twin[1]["head.fc"]})
    finally:
        del policy.module["idle"]
