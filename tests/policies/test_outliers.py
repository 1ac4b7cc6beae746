from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from omega_qvla.errors import NumericsError
from omega_qvla.policies.base import Policy, Site
from omega_qvla.policies.folding import divide_site, site_width
from omega_qvla.policies.outliers import add_outliers
from policies.tiny import TINY, tiny_observation


@pytest.fixture(params=list(TINY))
def policy(request: pytest.FixtureRequest) -> Policy:
    built: Policy = TINY[request.param]()
    return built


def linears(policy: Policy) -> set[str]:
    return {n for n, m in policy.module.named_modules() if isinstance(m, torch.nn.Linear)}


@contextmanager
def inputs_of(policy: Policy, names: set[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the inputs [rows, in] of the layers called `names`."""
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

    modules = [(name, policy.module.get_submodule(name)) for name in names]
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
        for name, m in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_sites_cover_the_default_targets_once(policy: Policy) -> None:
    consumers = [name for site in policy.sites() for name in site.consumers]
    assert len(consumers) == len(set(consumers))
    assert set(consumers) <= linears(policy)
    kinds = ("_proj", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    targets = {
        name
        for name in linears(policy)
        if name.endswith(kinds)
        and not any(part in name for part in ("vision", "vl_self", "action_in", "action_out"))
    }
    assert set(consumers) == targets


def test_consumers_of_a_site_read_one_tensor(policy: Policy) -> None:
    names = {name for site in policy.sites() for name in site.consumers}
    with inputs_of(policy, names) as seen:
        policy.infer(tiny_observation())
    unused = set(policy.unused_linears())
    # The last DiT block computes queries for fewer tokens than keys: compare the tail.
    for site in policy.sites():
        used = [seen[name] for name in site.consumers if name not in unused]
        for calls in used[1:]:
            assert len(calls) == len(used[0])
            for one, other in zip(used[0], calls, strict=True):
                rows = min(len(one), len(other))
                assert torch.equal(one[-rows:], other[-rows:]), site.consumers


@pytest.mark.parametrize("power", [64.0, 0.125])
def test_dividing_any_site_leaves_the_actions(policy: Policy, power: float) -> None:
    observation = tiny_observation()
    before = policy.infer(observation)
    for site in policy.sites():
        if site.producer is None:
            continue
        width = site_width(policy.module, site)
        divisor = torch.ones(width)
        divisor[:: max(1, width // 5)] = power
        with inputs_of(policy, {*site.consumers, *site.coupled}) as seen:
            policy.infer(observation)
            old = {name: torch.cat(calls) for name, calls in seen.items()}
            seen.clear()
            divide_site(policy.module, site, divisor)
            policy.infer(observation)
            new = {name: torch.cat(calls) for name, calls in seen.items()}
        for name in old:  # heads that share a value head are tied
            repeated = divisor.repeat(old[name].shape[1] // width)
            torch.testing.assert_close(
                new[name] * repeated, old[name], rtol=2e-3, atol=2e-3 * float(old[name].abs().max())
            )
    np.testing.assert_allclose(policy.infer(observation), before, atol=2e-4 * np.abs(before).max())


def test_outliers_preserve_the_function_and_reach_the_ratio(policy: Policy) -> None:
    observations = [tiny_observation(seed) for seed in range(3)]
    sites = [site for site in policy.sites() if site.producer is not None]
    names = {name for site in sites for name in (*site.consumers, *site.coupled)}
    names -= set(policy.unused_linears())

    def ratios() -> dict[str, float]:
        with inputs_of(policy, names) as seen:
            for observation in observations:
                policy.infer(observation)
        peaks = {name: torch.cat(calls).abs().amax(0) for name, calls in seen.items()}
        return {name: float(peak.max() / peak.median()) for name, peak in peaks.items()}

    before = [policy.infer(observation) for observation in observations]
    plain = ratios()
    done = add_outliers(policy, ratio=100, channels=4, seed=1)
    after = [policy.infer(observation) for observation in observations]
    scale = np.abs(before).max()
    assert np.abs(np.subtract(after, before)).max() < 1e-4 * scale
    assert {n for site in done for n in site.consumers} == names | set(policy.unused_linears())
    assert max(plain.values()) < 15
    rough = ratios()
    assert all(20 <= ratio <= 200 for ratio in rough.values()), rough
    for site in done:
        assert len(set(site.channels)) == 4
        top = 32 if site.consumers[0].endswith("down_proj") else 64
        assert max(site.factors) == top
        assert all(top / 4 <= factor <= top for factor in site.factors)
        assert all(np.log2(factor).is_integer() for factor in site.factors)


def test_outliers_are_seeded(policy: Policy) -> None:
    build = TINY[policy.family]
    one = add_outliers(build(), seed=1)
    assert one == add_outliers(build(), seed=1)
    assert one != add_outliers(build(), seed=2)


@pytest.mark.parametrize(("ratio", "channels"), [(1, 4), (float("inf"), 4), (100, 0), (100, 60)])
def test_impossible_outliers_are_refused(policy: Policy, ratio: float, channels: int) -> None:
    before = {k: v.clone() for k, v in policy.module.state_dict().items()}
    with pytest.raises(NumericsError):
        add_outliers(policy, ratio, channels)
    assert all(torch.equal(v, before[k]) for k, v in policy.module.state_dict().items())


def test_narrow_modulations_are_refused(policy: Policy) -> None:
    policy.module.to(torch.bfloat16)
    with pytest.raises(NumericsError, match=r"dtype=torch\.float32"):
        add_outliers(policy)


def test_a_site_without_producer_is_refused(policy: Policy) -> None:
    name = next(iter(linears(policy)))
    with pytest.raises(NumericsError, match="no producer"):
        divide_site(policy.module, Site((name,), None), torch.ones(1))
