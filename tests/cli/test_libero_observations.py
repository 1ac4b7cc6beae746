"""`--env libero_...`: the oracle's observations, and what is said where they cannot be had."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.calibration.samples import read_observations, write_observations
from omega_qvla.cli.console import Console
from omega_qvla.cli.libero_observations import expert_episode, from_libero, libero_options
from omega_qvla.cli.main import main
from omega_qvla.cli.parsing import LIBERO_SUITES
from omega_qvla.cli.sources import CALIBRATION_SEED, HELD_OUT_SEED
from omega_qvla.envs.libero import LiberoEnv
from omega_qvla.envs.libero_files import find_assets, has_substitutes
from omega_qvla.envs.libero_protocol import PROTOCOLS, SUITES
from omega_qvla.errors import EnvError, ObservationError
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

OWN = "name: small\ncamera_size: 32\nrendering: fast\nsettle_steps: 2\n"


@pytest.fixture
def given(pytestconfig: pytest.Config) -> Mapping[str, Any]:
    """assets and substitutes, as options of LiberoEnv."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    try:
        assets = find_assets(pytestconfig.getoption("--libero-assets"))
    except EnvError as error:
        pytest.skip(str(error))
    return {"assets": str(assets), "substitutes": has_substitutes(assets)}


def test_the_list_of_suites_is_the_environments() -> None:
    assert LIBERO_SUITES == SUITES


def test_options_are_complete_and_plain(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    for protocol, name in ((None, "openpi"), (str(tmp_path / "own.yaml"), "small")):
        args = argparse.Namespace(protocol=protocol, assets=Path("a"), substitutes=True)
        options = libero_options(args)
        assert options["protocol"]["name"] == name and options["assets"] == "a"
        assert set(options["protocol"]) == set(PROTOCOLS["openpi"].to_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--assets", "x"], "go with --env libero_"),
        (["--env", "metaworld", "--protocol", "openpi"], "go with --env libero_"),
        (["--env", "libero_object", "--protocol", "nope"], "unknown LIBERO protocol 'nope'"),
    ],
)
def test_options_that_do_not_fit_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(save_policy(tiny_pi05(), tmp_path / "checkpoint"))
    out = ["--out", str(tmp_path / "calibration.safetensors")]
    assert main(["calibrate", checkpoint, *words, *out]) == 2
    assert message in capsys.readouterr().err


def test_missing_assets_are_named_with_where_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    checkpoint = str(save_policy(tiny_pi05(), tmp_path / "checkpoint"))
    words = ["--env", "libero_object", "--tasks", "0", "--assets", str(tmp_path / "none")]
    out = ["--out", str(tmp_path / "calibration.safetensors"), "--num-samples", "2"]
    assert main(["calibrate", checkpoint, *words, *out]) == 2
    assert "get_assets_path" in capsys.readouterr().err


@pytest.mark.sim
@pytest.mark.libero
def test_the_expert_is_looked_at_until_it_succeeds(given: Mapping[str, Any]) -> None:
    protocol = {"name": "small", "camera_size": 32, "rendering": "fast", "settle_steps": 2}
    found = expert_episode("libero_object/1", HELD_OUT_SEED, 20, protocol=protocol, **given)
    steps = [step for step, _ in found]
    assert steps == list(range(0, 20 * len(found), 20)) and 4 <= len(found) <= 7
    last = found[-1][1]
    assert {image.shape for image in last.images.values()} == {(32, 32, 3)}
    assert last.prompt == "pick up the cream cheese and place it in the basket"
    assert np.abs(last.state - found[0][1].state).max() > 0.05


@pytest.mark.sim
@pytest.mark.libero
def test_observations_are_collected_and_kept(given: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    args = argparse.Namespace(
        env="libero_object", tasks=["1"], protocol=str(tmp_path / "own.yaml"), **given
    )
    samples = from_libero(args, Console(quiet=True), 10, CALIBRATION_SEED)
    assert len(samples) >= 10 and {meta.episode for meta in samples.meta} == {CALIBRATION_SEED}
    task = "libero_object/pick_up_the_cream_cheese_and_place_it_in_the_basket"
    assert {meta.task for meta in samples.meta} == {task}
    path = write_observations(
        tmp_path / "o.safetensors", samples.observations, samples.meta, samples.source
    )
    assert read_observations(path).digest() == samples.digest()


@pytest.mark.sim
@pytest.mark.libero
@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("front", "through the cameras front, wrist; libero has base, wrist, and lacks front"),
        ("base", "those of libero 7"),  # the policy has four
    ],
)
def test_a_policy_of_another_robot_is_refused_before_anything_is_made(
    camera: str,
    message: str,
    given: Mapping[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = save_policy(tiny_pi05(num_steps=2), tmp_path / "checkpoint")
    settings = checkpoint / "processor.json"
    settings.write_text(settings.read_text().replace('"base"', f'"{camera}"'))
    (tmp_path / "own.yaml").write_text(OWN)
    words = ["--suite", "libero_object", "--tasks", "1", "--trials", "1", "--workers", "0"]
    words += ["--protocol", str(tmp_path / "own.yaml"), "--assets", given["assets"]]
    words += ["--substitutes"] * given["substitutes"]
    out = tmp_path / "r.jsonl"
    assert main(["eval", str(checkpoint), *words, "--out", str(out), "--json"]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.sim
@pytest.mark.libero
def test_an_observation_without_a_camera_of_the_policy_is_refused(given: Mapping[str, Any]) -> None:
    protocol = {"name": "small", "camera_size": 32, "rendering": "fast", "settle_steps": 2}
    options = {"protocol": protocol, "cameras": {"front": "frontview"}}
    env = LiberoEnv("libero_object/1", **options, **given)
    seen = replace(env.reset(0), state=np.zeros(4, np.float32))  # as wide as the policy's
    env.close()
    with pytest.raises(ObservationError, match="base"):
        tiny_pi05(num_steps=2).infer(seen)
