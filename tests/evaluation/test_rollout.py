import json

import numpy as np
import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.records import Arm, Episode, EpisodeRecord, Protocol, Trace
from omega_qvla.evaluation.rollout import noise_seed, run_episode
from omega_qvla.evaluation.smoothness import action_jerk, jerk_ratio, path_jerk

from .fakes import FaultyPolicy, NanPolicy, NoisyPolicy, ReachEnv, StateEnv

ARM = Arm("full-precision", "nowhere", "toy")
EPISODE = Episode("reach", 1_000_003)


def play(policy, env=None, protocol=Protocol(), **options):  # noqa: B008
    return run_episode(policy, env or ReachEnv("reach"), ARM, EPISODE, protocol, **options)


def test_noise_depends_on_seed_and_replan_only():
    assert noise_seed(7, 2) == int(np.random.SeedSequence([7, 2]).generate_state(1)[0])
    assert len({noise_seed(s, r) for s in range(50) for r in range(50)}) == 2500


def test_success_ends_the_episode_and_renders_only_on_replans():
    env, policy = ReachEnv("reach"), NoisyPolicy()
    record, trace = play(policy, env)
    assert record.success
    assert record.steps < env.max_steps
    assert record.replans == env.observations == -(-record.steps // 5)
    assert policy.seeds == [noise_seed(EPISODE.seed, r) for r in range(record.replans)]
    assert trace.actions.shape == (record.steps, 2)
    assert np.abs(trace.actions).max() <= 1.0
    assert trace.replans.tolist() == list(range(0, record.steps, 5))
    assert trace.frames.shape[0] == 0


def test_failure_uses_all_steps():
    record, _ = play(NoisyPolicy(gain=-1), protocol=Protocol(execute=8, max_steps=30))
    assert (record.success, record.steps, record.replans) == (False, 30, 4)
    record, _ = play(NoisyPolicy(gain=-1))
    assert record.steps == ReachEnv.max_steps


def test_a_non_finite_action_is_a_failed_episode():
    record, trace = play(FaultyPolicy(gain=-1))
    assert not record.success
    assert "nan in channel 1" in record.error
    assert (record.steps, record.replans) == (10, 2)
    assert len(trace.actions) == 10


def test_a_policy_that_returns_nan_without_a_word_is_stopped_too():
    """The NaN is in the part that would not even have been executed."""

    class Watched(ReachEnv):
        def step(self, action):
            assert np.isfinite(action).all()
            return super().step(action)

    record, trace = play(NanPolicy(), Watched("reach"))
    assert not record.success
    assert "step 7, channel 1" in record.error
    assert (record.steps, record.replans) == (10, 2)
    assert np.isfinite(trace.actions).all()


def test_the_environments_own_cap_counts_where_the_protocol_has_none():
    record, _ = play(NoisyPolicy(gain=-1), protocol=Protocol(max_steps=None))
    assert record.steps == ReachEnv.max_steps


def test_denoising_steps_reach_the_policy():
    seen = []

    class Counting(NoisyPolicy):
        def infer(self, observation, *, seed=0, num_steps=None):
            seen.append(num_steps)
            return super().infer(observation, seed=seed)

    play(Counting(), protocol=Protocol(denoising_steps=8))
    play(Counting())
    assert set(seen) == {8, None}


def test_resets_are_timed_apart_from_rendering_where_the_environment_can():
    env = StateEnv("reach")
    record, _ = play(NoisyPolicy(), env)
    assert env.calls == ["reset_state"]
    assert record.replans == env.observations


@pytest.mark.parametrize("horizon", [3, 4])
def test_a_chunk_that_is_too_short_is_refused(horizon):
    with pytest.raises(EvaluationError, match="at least"):
        play(NoisyPolicy(horizon=horizon))


def test_frames_are_taken_at_the_steps_they_claim(tmp_path):
    protocol = Protocol(frame_size=4, frame_every=4)
    record, trace = play(NoisyPolicy(), protocol=protocol, record_frames=True)
    steps = [*range(0, record.steps, 4), record.steps]
    assert trace.frame_steps.tolist() == sorted(set(steps))
    assert trace.frames[:, 0, 0, 0].tolist() == trace.frame_steps.tolist()
    trace.save(tmp_path / "sub" / "trace.npz")
    again = Trace.load(tmp_path / "sub" / "trace.npz")
    np.testing.assert_array_equal(again.frames, trace.frames)
    np.testing.assert_array_equal(again.actions, trace.actions)
    assert again.success is True
    with pytest.raises(EvaluationError, match="trace"):
        Trace.load(tmp_path / "absent.npz")


def test_record_survives_json_and_refuses_other_fields():
    record, _ = play(NoisyPolicy())
    data = json.loads(json.dumps(record.to_dict()))
    assert EpisodeRecord.from_dict(data) == record
    with pytest.raises(EvaluationError, match="colour"):
        EpisodeRecord.from_dict({**data, "colour": "red"})


def test_jerk_by_hand():
    steps = np.arange(10.0)
    cubic = np.stack([steps**3, 2 * steps**3], axis=1)  # third difference 6 and 12
    assert action_jerk(cubic) == pytest.approx(np.hypot(6, 12))
    parabola = np.stack([steps**2], axis=1)
    assert action_jerk(parabola) == pytest.approx(0.0, abs=1e-9)
    assert path_jerk(parabola) == pytest.approx(2.0)  # the sum of squares is a cubic
    assert action_jerk(cubic[:3]) is None


def test_jerk_ratio_pairs_episodes():
    def record(seed, value):
        base = play(NoisyPolicy())[0].to_dict()
        return EpisodeRecord.from_dict(
            {**base, "seed": seed, "action_jerk": value, "path_jerk": value and value / 2}
        )

    reference = [record(1, 1.0), record(2, 2.0), record(3, None), record(4, 1.0)]
    other = [record(1, 4.0), record(2, 2.0), record(3, 5.0), record(9, 9.0)]
    ratio = jerk_ratio(reference, other)
    assert (ratio.actions, ratio.path, ratio.episodes) == pytest.approx((2.0, 2.0, 2))
    assert jerk_ratio(other, reference).actions == pytest.approx(0.5)
    assert jerk_ratio(reference, []) is None
