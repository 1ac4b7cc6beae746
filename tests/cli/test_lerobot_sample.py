"""From a real LeRobot dataset to a pack and its drift, by the verbs alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="needs the extra `lerobot`")
pytest.importorskip("av", reason="needs the extra `lerobot`")

from omega_qvla.cli.main import main
from policies.layouts import write_openpi
from policies.tiny import tiny_pi05

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "lerobot_sample" / "robot_sim.PickNPlace"
pytestmark = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="../shared/lerobot_sample is not beside the repository"
)
#: The dataset's camera and size are another robot's than any checkpoint's here; a setting
#: names the camera, and the images are resized as openpi does.
SETTINGS = "cameras: {base_0_rgb: ego_view, left_wrist_0_rgb: null, right_wrist_0_rgb: null}\n"
STATE = ["--state-key", "observation.state=22:24,29:31"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_openpi(tiny_pi05(num_steps=2), folder / "checkpoint")
    (folder / "settings.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(verb: str, *words: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = main([verb, *map(str, words), "--json", "--quiet"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err.strip()

    return call


def test_calibrate_quantize_inspect_compare(place: Path, run: Any) -> None:
    checkpoint = [place / "checkpoint", "--settings", place / "settings.yaml"]
    source = ["--dataset", SAMPLE, *STATE]
    calibration, pack = place / "c.safetensors", place / "p.safetensors"
    code, data, _ = run("calibrate", *checkpoint, *source, "--out", calibration)
    assert (code, data["observations"]) == (0, 10)  # the published number is the default
    words = ["--calibration", calibration, "--out", pack]
    assert run("quantize", *checkpoint, *words)[0] == 0
    code, data, _ = run("inspect", pack)
    used = data["calibration"]["samples"]
    assert len({(episode, step) for _, episode, step in used}) == 10
    counts = Counter(episode for _, episode, _ in used)
    assert len(counts) == 4 and set(counts.values()) == {2, 3}  # of five, one is held out
    assert "robot_sim.PickNPlace" in data["calibration"]["source"]
    assert "observation.state=22,23,29,30" in data["calibration"]["source"]
    again = [*source, "--seed", 7, "--out", place / "again.safetensors"]
    assert run("quantize", *checkpoint, *again)[0] == 0
    _, data, _ = run("inspect", place / "again.safetensors")
    assert data["calibration"]["samples"] != used
    assert {e for _, e, _ in data["calibration"]["samples"]} == set(counts)  # the same parting
    words = ["--checkpoint", *checkpoint, *source, "--pack", f"omega={pack}", "--num-samples", 6]
    code, data, _ = run("compare", *words)
    assert code == 0
    assert 0.9 < data["families"]["pi05"]["plain"]["omega"]["cosine"]["median"] < 1
    code, _, error = run("compare", *words, "--held-out", 0.6)
    assert code == 2
    assert "was calibrated on held-out episode(s)" in error


def test_the_sweep_of_the_published_numbers(place: Path, run: Any) -> None:
    words = [place / "checkpoint", "--settings", place / "settings.yaml", "--dataset", SAMPLE]
    words += [*STATE, "--sweep", "10,20", "--drift-samples", 4]
    code, data, _ = run("calibrate", *words)
    assert code == 0
    assert [row["samples"] for row in data["sweep"]] == [10, 20]
    calibrated = {episode for _, episode, _ in data["calibration"]}
    assert not calibrated & {episode for _, episode, _ in data["held_out"]}


def test_what_the_dataset_lacks_is_named(place: Path, run: Any) -> None:
    words = ["--dataset", SAMPLE, "--out", place / "x.safetensors"]
    code, _, error = run("calibrate", place / "checkpoint", *words, *STATE)
    assert code == 2  # without settings, the cameras are openpi's slots
    assert "no camera 'base_0_rgb'" in error
    assert "--camera base_0_rgb=KEY" in error and "ego_view" in error
    checkpoint = [place / "checkpoint", "--settings", place / "settings.yaml"]
    code, _, error = run("calibrate", *checkpoint, *words, "--state-key", "proprio")
    assert code == 2
    assert "no state 'proprio'" in error and "observation.state" in error
    code, _, error = run("calibrate", *checkpoint, *words)
    assert code == 2  # 44 motors where the policy has 4
    assert "ObservationError" in error and "44" in error
    assert "--state-key" in error
    assert not (place / "x.safetensors").exists()
