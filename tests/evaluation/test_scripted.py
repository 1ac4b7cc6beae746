import numpy as np
import pytest

from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.evaluation.policies import arm_fingerprint, load_policy
from omega_qvla.evaluation.records import Arm, Episode, Protocol
from omega_qvla.evaluation.rollout import run_episode
from omega_qvla.evaluation.scripted import OraclePolicy, RandomPolicy

from .fakes import ReachOracle, StateEnv

ARM = Arm("oracle", "", "scripted", policy="oracle")


def play(policy, env, seed=3):
    return run_episode(policy, env, ARM, Episode("reach", seed), Protocol())


def test_an_oracle_acts_every_step_and_nothing_is_rendered():
    env = StateEnv("reach")
    record, trace = play(OraclePolicy(ReachOracle), env)
    assert record.success and record.replans == record.steps
    assert env.observations == 0
    assert trace.actions.shape == (record.steps, 2)


def test_one_oracle_per_environment_told_of_every_episode():
    made = []

    def make(env):
        made.append(env)
        return ReachOracle(env)

    policy, envs = OraclePolicy(make), (StateEnv("a"), StateEnv("b"))
    for env in (envs[0], envs[0], envs[1]):
        assert play(policy, env)[0].success
    assert made == list(envs)
    with pytest.raises(EvaluationError, match="begin"):
        OraclePolicy(make).act()


def test_random_actions_follow_from_the_seed_and_do_not_solve_it():
    runs = [play(RandomPolicy(), StateEnv("reach"), seed) for seed in (3, 3, 4)]
    first, again, other = (trace.actions for _, trace in runs)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[:5], other[:5])
    assert not any(record.success for record, _ in runs)
    assert -1 <= first.min() < -0.5 and 0.5 < first.max() <= 1


def test_policies_by_name():
    assert isinstance(load_policy(Arm("r", "", "x", policy="random"), "any", "-"), RandomPolicy)
    assert isinstance(load_policy(ARM, "metaworld", "-"), OraclePolicy)
    own = Arm("own", "", "x", policy="tests.evaluation.fakes:load_oracle")
    assert isinstance(load_policy(own, "any", "-"), OraclePolicy)
    with pytest.raises(ConfigError, match="no oracle; those that have: metaworld, libero"):
        load_policy(ARM, "toys:make", "-")
    with pytest.raises(ConfigError, match="known: random, served"):
        load_policy(Arm("x", "", "x", policy="no.such:thing"), "any", "-")


def test_a_scripted_arm_is_known_by_its_source():
    found = arm_fingerprint(Arm("r", "", "x", policy="random"), "any", {})
    assert set(found) == {"policy", "source"} and len(found["source"]) == 64
    own = Arm("own", "", "x", policy="tests.evaluation.fakes:load_oracle")
    assert arm_fingerprint(own, "any", {})["source"] != found["source"]


@pytest.mark.sim
def test_metaworlds_oracle_solves_its_tasks_and_random_actions_do_not():
    pytest.importorskip("metaworld")
    from omega_qvla.envs.metaworld import MetaWorldEnv

    for task in ("door-open", "window-open"):
        env = MetaWorldEnv(task, size=8)
        oracle = load_policy(ARM, "metaworld", "-")
        assert [play(oracle, env, seed)[0].success for seed in (1, 2)] == [True, True]
        assert not play(RandomPolicy(), env, 1)[0].success
        env.close()
