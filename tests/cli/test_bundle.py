"""`omega-qvla bundle`, and the verbs that take a bundle in place of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.helpers import tiny_samples
from cli.fakes import TASKS
from omega_qvla.calibration.samples import write_observations
from omega_qvla.cli.main import main
from omega_qvla.config import preset
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from policies.tiny import TINY

Run = Any


@pytest.fixture(scope="module", params=list(TINY))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoint`, `pack`, `observations` and the `bundle` of them."""
    folder = tmp_path_factory.mktemp("cli-bundle")
    save_policy(TINY[request.param](num_steps=2), folder / "checkpoint")
    samples = tiny_samples(3)
    observations = folder / "observations.safetensors"
    write_observations(observations, samples.observations, samples.meta, "a test")
    policy = load_policy(folder / "checkpoint")
    quantize_policy(policy, preset("omega"), samples, out=folder / "pack.safetensors")
    words = [f"{folder}/checkpoint", f"{folder}/pack.safetensors", "--out", f"{folder}/bundle"]
    assert main(["bundle", *words, "--bake-steps", "2", "--quiet"]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command with --json; returns its exit code and the object it printed."""

    def call(*words: object) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*map(str, words), "--json", "--quiet"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    return call


def test_bundle_reports_the_drift_of_what_is_lossy(place: Path, tmp_path: Path, run: Run) -> None:
    words = ["bundle", place / "checkpoint", place / "pack.safetensors"]
    words += ["--observations", place / "observations.safetensors"]
    code, exact = run(*words, "--out", tmp_path / "exact")
    assert code == 0
    assert exact["lossy"] == []
    assert exact["drift"]["relative_error"] == 0
    code, lossy = run(*words, "--out", tmp_path / "lossy", "--embed", "int8", "--vision", "int8")
    assert code == 0
    assert lossy["lossy"] == ["embed", "vision"]
    assert 0 < lossy["drift"]["relative_error"] < 0.3
    assert lossy["drift"]["count"] == 3
    assert lossy["bytes"] < exact["bytes"]
    assert sum(lossy["parts"].values()) < lossy["bytes"]


def test_info_and_verify_take_a_bundle(place: Path, run: Run) -> None:
    code, data = run("info", place / "bundle")
    assert code == 0
    assert (data["num_steps"], data["baked"], data["recipe"]) == (2, True, "omega")
    assert data["image_size"] == 32
    code, data = run("verify", place / "bundle", place / "checkpoint")
    assert code == 0
    assert data["passed"]
    assert any(check["what"] == "source" for check in data["checks"])


def test_eval_takes_a_bundle_and_acts_like_its_pack(place: Path, tmp_path: Path, run: Run) -> None:
    words = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--episodes", 2, "--workers", 0]
    code, data = run("eval", place / "bundle", *words, "--out", tmp_path / "one.jsonl")
    assert code == 0
    assert [name.rpartition("/")[2] for name in data["arms"]] == ["bundle"]
    arms = ["--arm", f"pack={place}/pack.safetensors", "--arm", f"other={place}/bundle"]
    both = [*words, "--no-reference", *arms, "--out", tmp_path / "two.jsonl"]
    code, data = run("eval", place / "checkpoint", *both)
    assert code == 0
    pack, other = data["arms"].values()
    assert pack["tasks"] == other["tasks"]
    assert (pack["episodes"], other["errors"]) == (4, 0)


def test_refusals(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack, bundle, checkpoint = (
        f"{place}/{n}" for n in ("pack.safetensors", "bundle", "checkpoint")
    )
    out = ["--out", f"{tmp_path}/x"]
    cases = (
        (["bundle", checkpoint, pack, "--out", bundle], "exists already"),
        (["bundle", checkpoint, pack, *out, "--observations", "nowhere"], "nothing was written"),
        (["bundle", bundle, pack, *out], "is a bundle already"),
        (["bundle", checkpoint, f"{place}/none", *out], f"{place}/none: cannot be read"),
        (["eval", bundle, *out, "--arm", f"a={pack}", "--tasks", "drawer-open"], "takes no pack"),
        (["calibrate", bundle, *out, "--num-samples", "2",
          "--observations", f"{place}/observations.safetensors"],
         "is a bundle"),
    )  # fmt: skip
    for words, message in cases:
        capsys.readouterr()
        assert main([*words, "--quiet"]) == 2, words
        assert message in capsys.readouterr().err, words
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "bundle" / "rest.safetensors"
    good = file.read_bytes()
    try:
        file.write_bytes(good[:-1])
        for words in (["verify"], ["info"]):
            assert main([*words, f"{place}/bundle"]) == 2
            assert "BundleError" in (error := capsys.readouterr().err)
            assert "rest.safetensors is truncated" in error
    finally:
        file.write_bytes(good)
