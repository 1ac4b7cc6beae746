from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from calibration.helpers import tiny_samples
from omega_qvla.config import preset
from omega_qvla.errors import (
    ActionError,
    BackendError,
    CheckpointError,
    ObservationError,
    PackError,
)
from omega_qvla.pack import apply_pack
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine
from policies.tiny import TINY, tiny_observation


@pytest.fixture(scope="module", params=list(TINY))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoint` and its `pack`."""
    folder = tmp_path_factory.mktemp("built")
    save_policy(TINY[request.param](), folder / "checkpoint")
    policy = load_policy(folder / "checkpoint")
    quantize_policy(policy, preset("omega"), tiny_samples(2), out=folder / "pack")
    return folder


def test_full_precision_engine_is_the_policy(built: Path) -> None:
    engine = Engine.load(built / "checkpoint", fast=False)
    assert engine.backend == "none"
    assert engine.report is None
    expected = load_policy(built / "checkpoint").infer(tiny_observation(), seed=3)
    np.testing.assert_array_equal(engine.infer(tiny_observation(), seed=3), expected)
    fast = Engine.load(built / "checkpoint").infer(tiny_observation(), seed=3)
    np.testing.assert_allclose(fast, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_quantized_engine_is_the_policy_with_its_pack(built: Path) -> None:
    engine = Engine.load(built / "checkpoint", built / "pack", fast=False)
    assert engine.report is not None
    assert engine.backend == engine.report.backend != "none"
    policy = load_policy(built / "checkpoint")
    reference = policy.infer(tiny_observation(), seed=3)
    apply_pack(policy, built / "pack")
    actions = engine.infer(tiny_observation(), seed=3)
    np.testing.assert_array_equal(actions, policy.infer(tiny_observation(), seed=3))
    assert actions.dtype == np.float32
    assert actions.shape == (policy.action_horizon, policy.action_dim)
    assert np.abs(actions - reference).max() > 1e-4
    noise = engine.policy.draw_noise(1, 3)[0]
    np.testing.assert_array_equal(engine.infer(tiny_observation(), noise=noise), actions)


def test_emulated_and_auto_agree(built: Path) -> None:
    auto = Engine.load(built / "checkpoint", built / "pack")
    emulated = Engine.load(built / "checkpoint", built / "pack", backend="emulated")
    assert emulated.backend == "emulated"
    one, other = (engine.infer(tiny_observation()) for engine in (auto, emulated))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_bad_observations(built: Path) -> None:
    engine = Engine.load(built / "checkpoint", built / "pack")
    good = tiny_observation()
    camera = next(iter(good.images))
    missing = {name: image for name, image in good.images.items() if name != camera}
    bad = {
        "NaN": dataclasses.replace(good, state=np.full_like(good.state, np.nan)),
        "camera": dataclasses.replace(good, images=missing),
        "dtype": dataclasses.replace(
            good, images={**good.images, camera: good.images[camera] / np.float32(255)}
        ),
        "shape": dataclasses.replace(
            good, images={**good.images, camera: good.images[camera][..., :1]}
        ),
    }
    for observation in bad.values():
        with pytest.raises(ObservationError):
            engine.infer(observation)


def test_non_finite_or_misshapen_actions_never_leave(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(built / "checkpoint")
    good = engine.infer(tiny_observation())
    broken = good.copy()
    broken[1, 2] = np.inf
    for actions, message in ((broken, "step 1, channel 2"), (good[1:], "expected")):
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.policy), "infer", lambda *_, a=actions, **__: a)
            with pytest.raises(ActionError, match=message):
                engine.infer(tiny_observation())


def test_what_cannot_be_loaded(built: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Engine.load(tmp_path)
    with pytest.raises(BackendError, match="abacus"):
        Engine.load(built / "checkpoint", built / "pack", backend="abacus")
    (tmp_path / "cut").write_bytes((built / "pack").read_bytes()[:-1])
    with pytest.raises(PackError, match="truncated"):
        Engine.load(built / "checkpoint", tmp_path / "cut")
    for make in TINY.values():
        save_policy(make(seed=8), tmp_path / "other")
        with pytest.raises(PackError):
            Engine.load(tmp_path / "other", built / "pack")
