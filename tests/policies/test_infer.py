from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omega_qvla.errors import ActionError, ObservationError
from omega_qvla.modules.step_context import Step, current_step
from omega_qvla.policies.base import Policy
from policies.tiny import PROMPTS, TINY, tiny_observation


@pytest.fixture(params=list(TINY))
def policy(request: pytest.FixtureRequest) -> Policy:
    built: Policy = TINY[request.param]()
    return built


def test_infer_is_reproducible_and_seeded(policy: Policy) -> None:
    observation = tiny_observation()
    first = policy.infer(observation, seed=3)
    assert first.shape == (policy.action_horizon, policy.action_dim)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, policy.infer(observation, seed=3))
    assert np.abs(first - policy.infer(observation, seed=4)).max() > 1e-3
    noise = policy.draw_noise(1, seed=3)[0]
    np.testing.assert_array_equal(first, policy.infer(observation, noise=noise))


@pytest.mark.parametrize("part", ["prompt", "state", "base", "wrist"])
def test_every_part_of_the_observation_matters(policy: Policy, part: str) -> None:
    one, other = tiny_observation(0), tiny_observation(1)
    changes = {
        "prompt": {"prompt": PROMPTS[1]},
        "state": {"state": other.state},
        "base": {"images": {**one.images, "base": other.images["base"]}},
        "wrist": {"images": {**one.images, "wrist": other.images["wrist"]}},
    }
    changed = replace(one, **changes[part])  # type: ignore[arg-type]
    assert np.abs(policy.infer(one) - policy.infer(changed)).max() > 1e-5


def test_a_batch_gives_what_each_observation_gets_alone(policy: Policy) -> None:
    observations = [tiny_observation(0, PROMPTS[0]), tiny_observation(1, PROMPTS[1])]
    noise = policy.draw_noise(2, seed=0)
    inputs = policy.prepare(observations)
    batch = policy.finish(policy.sample(policy.encode(inputs), noise), inputs)
    for row, observation in enumerate(observations):
        alone = policy.infer(observation, noise=noise[row])
        np.testing.assert_allclose(batch[row], alone, atol=2e-5)


def test_sample_announces_every_step_and_encode_none(policy: Policy) -> None:
    seen: list[tuple[str, Step | None]] = []
    independent = set(policy.step_independent_linears())
    for name, module in policy.module.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: seen.append((name, current_step())))
    policy.infer(tiny_observation())
    for name, step in seen:
        outside = policy.side_of(name) == "backbone" or name in independent
        outside = outside or "vl_self_attention" in name
        assert (step is None) == outside, name
    steps = [step for _, step in seen if step is not None]
    assert sorted(set(steps)) == [Step(s, policy.num_steps) for s in range(policy.num_steps)]
    ran = {name for name, _ in seen}
    linears = {n for n, m in policy.module.named_modules() if isinstance(m, torch.nn.Linear)}
    # The first patch projection and heads count too: exactly the declared ones never run.
    assert linears - ran == set(policy.unused_linears())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "camera 'base' is missing"),
        ({"images": {"base": np.zeros((32, 32, 3), np.uint8)}}, "camera 'wrist' is missing"),
        ({"size": (31, 32, 3)}, r"'wrist': got uint8 \[31, 32, 3\], wanted uint8 \[32, 32, 3\]"),
        ({"size": (32, 32)}, r"'wrist': got uint8 \[32, 32\]"),
        ({"size": (32, 32, 4)}, r"'wrist': got uint8 \[32, 32, 4\]"),
        ({"dtype": np.float32}, r"'wrist': got float32"),
        ({"state": np.array([0, np.nan, 0, 0], np.float32)}, r"entries \[1\] are not finite"),
        ({"state": np.array([0, np.inf, 0, 0], np.float32)}, r"entries \[1\] are not finite"),
        ({"state": np.zeros(5, np.float32)}, r"got float32 \[5\], wanted float \[4\]"),
        ({"state": np.array(["a"] * 4)}, "wanted float"),
    ],
)
def test_bad_observations_are_named(
    policy: Policy, change: dict[str, object], message: str
) -> None:
    observation = tiny_observation()
    if "size" in change or "dtype" in change:
        wrist = np.zeros(change.get("size", (32, 32, 3)), change.get("dtype", np.uint8))  # type: ignore[call-overload]
        change = {"images": {**observation.images, "wrist": wrist}}
    with pytest.raises(ObservationError, match=message):
        policy.infer(replace(observation, **change))  # type: ignore[arg-type]


def test_no_observation_is_refused(policy: Policy) -> None:
    with pytest.raises(ObservationError):
        policy.prepare([])


def test_unknown_words_are_accepted(policy: Policy) -> None:
    observation = replace(tiny_observation(), prompt="fetch Grandma's teapot #3!")
    assert np.isfinite(policy.infer(observation)).all()


def test_non_finite_actions_never_leave(policy: Policy) -> None:
    noise = policy.draw_noise(1, seed=0)
    noise[0, 1, 0] = float("nan")
    with pytest.raises(ActionError, match="non-finite"):
        policy.infer(tiny_observation(), noise=noise)
