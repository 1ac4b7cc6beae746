from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calibration.toy import HORIZON, TOKENS, WIDTH, ToyPolicy
from omega_qvla.calibration import collect
from omega_qvla.calibration.collect import noise_seed
from omega_qvla.errors import CalibrationError
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.numerics.smoothing import robust_profile
from omega_qvla.policies.observation import Observation

LAYERS = ["q", "k", "out", "cross", "act"]


def observations(count: int = 3, tokens: int = TOKENS) -> list[Observation]:
    rng = np.random.default_rng(0)
    shape = (tokens, WIDTH)
    return [Observation({}, rng.normal(size=shape).astype(np.float32), "") for _ in range(count)]


def run(policy: Any = None, layers: list[str] = LAYERS, **options: Any) -> Any:
    given = options.pop("observations", None) or observations()
    return collect(policy or ToyPolicy(), given, layers, **options)


def test_statistics_equal_those_of_all_tokens() -> None:
    stats = run()
    policy = ToyPolicy()
    x = torch.tanh(torch.cat([policy.prepare([o])[0] for o in observations()]))
    torch.testing.assert_close(stats["q"].hessian, x.T @ x / len(x))
    torch.testing.assert_close(stats["q"].profile, robust_profile(x))
    assert torch.equal(stats["q"].hessian, stats["q"].hessian.T)
    assert stats["q"].count == len(x) == 3 * TOKENS
    torch.testing.assert_close(stats["q"].tokens[0], x)
    assert len(stats["q"].tokens) == len(stats["cross"].tokens) == 1


def test_tokens_are_filed_under_their_step() -> None:
    stats = run(seed=7)
    policy = ToyPolicy()
    starts = []
    with torch.no_grad():
        for i, observation in enumerate(observations()):
            prefix = policy.encode(policy.prepare([observation]))
            noise = policy.draw_noise(1, noise_seed(7, i))
            starts.append((noise + policy.module.cross(prefix).mean())[0])
    x = torch.cat(starts)
    assert len(stats["act"].tokens) == 4
    for step, tokens in enumerate(stats["act"].tokens):
        torch.testing.assert_close(tokens, x * (step + 1))
    gram = sum((step + 1) ** 2 for step in range(4)) * (x.T @ x)
    torch.testing.assert_close(stats["act"].hessian, gram / (4 * len(x)))
    torch.testing.assert_close(stats["act"].profile, robust_profile(x))  # gains drop out


def test_layers_that_share_an_input_share_their_statistics() -> None:
    stats = run()
    assert stats["q"] is stats["k"]
    assert len({id(s) for s in stats.values()}) == 4
    assert run(layers=["k"])["k"].hessian.equal(stats["k"].hessian)


def test_token_cap_keeps_an_even_share_and_counts_everything() -> None:
    given = observations(count=4, tokens=50)
    everything, capped = run(observations=given), run(observations=given, token_cap=10)
    assert len(capped["q"].tokens[0]) == 10
    assert [len(tokens) for tokens in capped["act"].tokens] == [10] * 4
    torch.testing.assert_close(capped["q"].hessian, everything["q"].hessian, rtol=0, atol=0)
    assert capped["q"].count == 200
    full, kept = everything["q"].tokens[0], capped["q"].tokens[0]
    places = [int((full == row).all(1).nonzero()[0, 0]) for row in kept]
    assert [place // 50 for place in places] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert places == sorted(set(places))
    within = [{place % 50 for place in places if place // 50 == i} for i in (1, 3)]
    assert within[0] != within[1], "every observation gives tokens of the same positions"


def test_the_kept_tokens_depend_on_the_seed_alone() -> None:
    given = observations(tokens=50)
    one = run(observations=given, token_cap=9, seed=1)
    alone = run(observations=given, token_cap=9, seed=1, layers=["k"])
    other = run(observations=given, token_cap=9, seed=2)
    assert one["k"].tokens[0].equal(alone["k"].tokens[0])
    assert not one["k"].tokens[0].equal(other["k"].tokens[0])


def test_more_observations_than_the_cap() -> None:
    assert len(run(observations=observations(7, 2), token_cap=3)["q"].tokens[0]) == 3


def test_hooks_are_gone_afterwards_even_after_a_failure() -> None:
    for policy in (ToyPolicy(), ToyPolicy(poison=2)):
        with contextlib.suppress(CalibrationError):
            run(policy)
        assert not any(module._forward_pre_hooks for module in policy.module.modules())


def test_a_missing_step_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"layer act: .*misses denoising step\(s\) 2 of 4"):
        run(ToyPolicy(skipped=2))


def test_non_finite_input_is_named_with_its_step() -> None:
    with pytest.raises(CalibrationError, match="layer act: non-finite input in step 2, observ"):
        run(ToyPolicy(poison=2))
    broken = observations()
    broken[1].state[0, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"layer q: .*outside the .*, observation 1"):
        run(observations=broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["q", "idle"]}, r"1 layer\(s\) never ran.*first idle"),
        ({"layers": ["nothing"]}, "no layer nothing"),
        ({"layers": ["norm"]}, "norm is a LayerNorm, not a linear"),
        ({"token_cap": 0}, "cap of at least 1"),
    ],
)
def test_impossible_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(**options)
    with pytest.raises(CalibrationError, match="takes observations"):
        collect(ToyPolicy(), [], LAYERS)  # type: ignore[arg-type]


def test_a_trajectory_of_another_length() -> None:
    policy = ToyPolicy()
    real = policy.sample
    policy.sample = lambda prefix, noise, steps: real(prefix, noise, 3)  # type: ignore
    with pytest.raises(CalibrationError, match=r"act: .*of 3 denoising steps; .* for 4"):
        run(policy)
    assert len(run(num_steps=2)["act"].tokens) == 2


def change_act(policy: ToyPolicy, call: Callable[[ToyPolicy], None]) -> ToyPolicy:
    real = policy.sample

    def sample(prefix: Any, noise: Any, steps: Any) -> Any:
        call(policy)
        return real(prefix, noise, steps)

    policy.sample = sample  # type: ignore[method-assign]
    return policy


def test_inside_and_outside_the_steps_at_once() -> None:
    def early(policy: ToyPolicy) -> None:
        policy.module.act(torch.ones(1, WIDTH))

    policy = change_act(ToyPolicy(), early)
    with pytest.raises(CalibrationError, match="act runs both inside and outside"):
        run(policy)


def test_an_input_shared_only_sometimes() -> None:
    def again(policy: ToyPolicy) -> None:
        policy.module.k(torch.ones(1, WIDTH))

    with pytest.raises(CalibrationError, match="layer k shares its input with q in one call"):
        run(change_act(ToyPolicy(), again))

    def leader_alone(policy: ToyPolicy) -> None:
        policy.module.q(torch.ones(1, WIDTH))

    with pytest.raises(CalibrationError, match=r"k ran 3 times but q, .* 6 times"):
        run(change_act(ToyPolicy(), leader_alone))


def test_progress_and_horizon() -> None:
    seen: list[tuple[int, int]] = []
    stats = run(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert stats["act"].count == 3 * HORIZON * 4


def test_steps_opened_by_somebody_else_do_not_leak() -> None:
    with denoising_step(0, 9), pytest.raises(CalibrationError, match="of 9 denoising steps"):
        run(layers=["q"])
