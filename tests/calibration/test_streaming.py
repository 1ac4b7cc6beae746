"""Calibration stage by stage: the same statistics, with one stage's weights at a time."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
import torch

from calibration.helpers import all_targets, tiny_samples
from omega_qvla.calibration.collect import collect
from omega_qvla.calibration.lockstep import lockstep
from omega_qvla.calibration.streaming import stream
from omega_qvla.config import preset
from omega_qvla.errors import CalibrationError, CheckpointError, ObservationError
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy, save_policy, source_hashes
from omega_qvla.policies.weights import ResidentWeights, StoredWeights, open_policy
from omega_qvla.quantize import BuildReport, Progress, quantize_policy
from policies.tiny import TINY, tiny_pi05

OMEGA, PAPER = preset("omega"), preset("omega-paper")


@pytest.fixture(params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_policy(TINY[request.param](), tmp_path / "checkpoint", torch.float32)


def streamed(policy: Policy, names: list[str]) -> dict[str, LayerStats]:
    found: dict[str, LayerStats] = {}
    weights = ResidentWeights(policy.module)
    for stats in stream(policy, weights, tiny_samples().observations, names, token_cap=7):
        assert not set(stats) & set(found)
        found |= stats
    return found


@pytest.mark.parametrize("family", TINY)
def test_statistics_are_those_of_running_the_policy_whole(family: str) -> None:
    policy = TINY[family]()
    names = all_targets(policy)
    whole, parts = collect(policy, tiny_samples(), names, token_cap=7), streamed(policy, names)
    assert set(parts) == set(whole)
    for name, expected in whole.items():
        got = parts[name]
        assert got.count == expected.count
        assert torch.equal(got.hessian, expected.hessian), name
        assert torch.equal(got.profile, expected.profile), name
        assert len(got.tokens) == len(expected.tokens)
        assert all(torch.equal(a, b) for a, b in zip(got.tokens, expected.tokens, strict=True))


@pytest.mark.parametrize("family", TINY)
def test_the_stages_are_the_whole_network(family: str) -> None:
    """Every tensor belongs to exactly one stage, but those that inference never reads."""
    policy = TINY[family]()
    parts = [part for stage in policy.stages() for part in stage.parts]
    for name in policy.module.state_dict():
        count = sum(name.startswith(f"{part}.") for part in parts)
        assert count == (0 if name.endswith("language_model.norm.weight") else 1), name


@pytest.mark.parametrize("recipe", [OMEGA, PAPER], ids=["omega", "omega-paper"])
def test_weights_in_their_files_give_the_same_pack(
    folder: Path, recipe: object, tmp_path: Path
) -> None:
    resident = load_policy(folder)
    quantize_policy(resident, recipe, tiny_samples(), out=tmp_path / "a")  # type: ignore[arg-type]
    policy, weights = open_policy(folder)
    assert weights.hashes() == source_hashes(resident)
    quantize_policy(
        policy,
        recipe,  # type: ignore[arg-type]
        tiny_samples(),
        out=tmp_path / "b",
        weights=weights,
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(tensor.is_meta for tensor in policy.module.state_dict().values())


def test_one_stage_is_loaded_at_a_time(folder: Path) -> None:
    policy, weights = open_policy(folder)
    sizes = {stage.parts: 0 for stage in policy.stages()}
    for name, tensor in policy.module.state_dict().items():
        for parts in sizes:
            if any(name.startswith(f"{part}.") for part in parts):
                sizes[parts] += tensor.numel()
    seen = []
    names = all_targets(policy)
    for _ in stream(policy, weights, tiny_samples().observations, names, token_cap=7):
        real = [t.numel() for t in policy.module.state_dict().values() if not t.is_meta]
        seen.append(sum(real))
    assert 0 < max(seen) <= max(sizes.values())
    assert min(seen) < max(sizes.values()) / 2  # a language layer or a block of the head


def test_sixteen_bit_weights_run_in_sixteen_bits(folder: Path, tmp_path: Path) -> None:
    policy, weights = open_policy(folder, dtype=torch.bfloat16)
    samples = tiny_samples()
    one = quantize_policy(policy, OMEGA, samples, out=tmp_path / "a", weights=weights)
    resident = load_policy(folder, dtype=torch.bfloat16)
    assert (
        one.read_bytes()
        == quantize_policy(resident, OMEGA, samples, out=tmp_path / "b").read_bytes()
    )


def test_layers_in_no_stage_and_no_observations() -> None:
    policy = tiny_pi05()
    weights = ResidentWeights(policy.module)
    unused = "paligemma_with_expert.paligemma.model.language_model.norm"
    with pytest.raises(CalibrationError, match="in no stage"):
        next(stream(policy, weights, tiny_samples().observations, [unused], token_cap=7))
    nothing = stream(policy, weights, [], all_targets(policy), token_cap=7)
    with pytest.raises(CalibrationError, match="takes observations"):
        next(nothing)


def test_errors_come_through_and_no_thread_stays() -> None:
    policy, samples = tiny_pi05(), tiny_samples()
    before = threading.active_count()
    first = samples.observations[0]
    blind = Observation({"base": first.images["base"]}, first.state, first.prompt)
    weights = ResidentWeights(policy.module)
    names = all_targets(policy)
    with pytest.raises(ObservationError):
        next(stream(policy, weights, [first, blind], names, token_cap=7))
    left = stream(policy, weights, samples.observations, names, token_cap=7)
    next(left)
    left.close()  # a caller that is interrupted
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks for module in policy.module.modules())


def test_inferences_take_turns() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Identity(), "b": torch.nn.Identity()})
    order: list[str] = []

    def body(name: str) -> object:
        def run(mark: object) -> None:
            for part in ("a", "b"):
                module[part](torch.zeros(1))
                order.append(f"{name}{part}")

        return run

    bodies = [body("1"), body("2")]
    with lockstep(module, bodies, ["b"]) as together:  # type: ignore[arg-type]
        for until in ("b", None):
            for index in range(2):
                together.advance(index, until)
    assert order == ["1a", "2a", "1b", "2b"]


def test_tied_tensors_must_agree(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_policy(TINY["groot_n15"](), tmp_path / "checkpoint", torch.float32)
    file = folder / "model.safetensors"
    state = load_file(file)
    language = "backbone.eagle_model.language_model"
    state[f"{language}.lm_head.weight"] = state[f"{language}.model.embed_tokens.weight"] + 1
    save_file(state, file, {"format": "pt"})
    _, weights = open_policy(folder)
    assert isinstance(weights, StoredWeights)
    with pytest.raises(CheckpointError, match="tied but differ"):
        weights.hashes()


def test_the_report_accounts_for_the_time(folder: Path, tmp_path: Path) -> None:
    policy, weights = open_policy(folder)
    reports: list[BuildReport] = []
    quantize_policy(
        policy,
        OMEGA,
        tiny_samples(),
        out=tmp_path / "p",
        weights=weights,
        on_report=reports.append,
    )
    (report,) = reports
    assert {"load", "collect", "hessian", "scales", "factorize", "round", "write"} <= set(
        report.phases
    )
    assert report.built == report.layers == len(all_targets(policy))
    assert all(spent.wall >= 0 for spent in report.phases.values())
    assert report.peak_memory > 1 << 20


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def test_a_killed_build_from_the_files_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    def build(out: str, stop: int | None = None) -> Path:
        def progress(event: Progress) -> None:
            if event.stage == "quantizing" and event.done == stop:
                raise Killed

        policy, weights = open_policy(folder)
        return quantize_policy(
            policy,
            OMEGA,
            tiny_samples(),
            out=tmp_path / out,
            weights=weights,
            progress=progress,
        )

    before = threading.active_count()  # other tests of this process may have left some
    whole = build("whole")
    # In the middle of a language layer; between the stages; in a block of the head.
    for stop in (3, 9, 20):
        with pytest.raises(Killed):
            build("cut", stop)
        assert threading.active_count() == before
    assert build("cut").read_bytes() == whole.read_bytes()


def test_the_share_of_the_work_grows_to_all_of_it() -> None:
    events: list[Progress] = []
    policy = tiny_pi05()
    with tempfile.TemporaryDirectory() as folder:
        quantize_policy(
            policy, OMEGA, tiny_samples(), out=Path(folder) / "p", progress=events.append
        )
    shares = [event.share for event in events]
    assert shares == sorted(shares)
    assert shares[0] == 0.0 and shares[-1] == pytest.approx(1.0)
