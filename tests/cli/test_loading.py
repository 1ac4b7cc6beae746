"""Checkpoints that do not say everything themselves, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.helpers import tiny_samples
from cli.fakes import TASKS
from omega_qvla.calibration.samples import write_observations
from omega_qvla.cli.main import main
from omega_qvla.pack import read_pack
from policies.layouts import wide_pi05, write_lerobot_pi05, write_openpi
from policies.tiny import tiny_pi05

Run = Any
SETTINGS = """\
cameras:  # the robot's name of each image slot
  base_0_rgb: base
  left_wrist_0_rgb: wrist
  right_wrist_0_rgb: null
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An openpi checkpoint without a tokenizer, what it lacks, observations, and packs."""
    folder = tmp_path_factory.mktemp("loading")
    write_openpi(tiny_pi05(num_steps=2), folder / "checkpoint")
    (folder / "checkpoint/tokenizer.json").rename(folder / "words.json")
    (folder / "settings.yaml").write_text(SETTINGS)
    samples = tiny_samples(3)
    write_observations(folder / "o.safetensors", samples.observations, samples.meta, "a test")
    for side in ("both", "action_head"):
        words = ["--out", folder / f"{side}.safetensors", "--side", side, "--num-samples", 3]
        words += ["--observations", folder / "o.safetensors", *said(folder)]
        assert main(["quantize", str(folder / "checkpoint"), *map(str, words), "--quiet"]) == 0
    return folder


def said(place: Path) -> list[object]:
    return ["--settings", place / "settings.yaml", "--tokenizer", place / "words.json"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command with --json; returns exit code, object and the last line on stderr."""

    def call(*words: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = main([*map(str, words), "--json", "--quiet"])
        captured = capsys.readouterr()
        data = json.loads(captured.out) if captured.out else None
        return code, data, captured.err.strip()

    return call


def test_what_is_lacking_is_asked_for_and_can_be_said(place: Path, run: Run) -> None:
    checkpoint = place / "checkpoint"
    code, _, error = run("info", checkpoint)
    assert code == 2
    assert "--tokenizer" in error
    code, data, _ = run("info", checkpoint, "--tokenizer", place / "words.json")
    assert (code, data["cameras"][0]) == (0, "base_0_rgb")
    code, data, _ = run("info", checkpoint, *said(place))
    assert (code, data["cameras"]) == (0, ["base", "wrist"])


def test_every_verb_takes_them(place: Path, tmp_path: Path, run: Run) -> None:
    checkpoint, pack, seen = (
        place / n for n in ("checkpoint", "both.safetensors", "o.safetensors")
    )
    out = ["--out", tmp_path / "c", "--observations", seen, "--num-samples", 2]
    assert run("calibrate", checkpoint, *out, *said(place))[0] == 0
    code, data, _ = run("verify", pack, checkpoint, *said(place))
    assert (code, data["passed"]) == (0, True)
    out = ["--out", tmp_path / "bundle", "--embed", "int8", "--observations", seen]
    code, data, _ = run("bundle", checkpoint, pack, *out, *said(place))
    assert code == 0
    assert 0 < data["drift"]["relative_error"] < 0.3
    words = ["--pack", pack, "--observations", seen, "--rounds", 1, "--act-bits", 8]
    code, data, _ = run(
        "bench", checkpoint, *words, *said(place), "--backends", "emulated", "--no-bf16"
    )
    assert [row["arm"] for row in data["results"]] == ["fp32", "control", "both emulated"]
    assert {row["arm"] for row in data["memory"]} <= {"fp32", "control", "emulated"}
    play = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--episodes", 1, "--workers", 0]
    arms = ["--arm", f"omega={pack}", "--arm", f"small={tmp_path}/bundle"]
    code, data, _ = run("eval", checkpoint, *play, *arms, "--out", tmp_path / "r", *said(place))
    assert code == 0
    assert len(data["arms"]) == 3
    published = ["--from-published", tmp_path / "none.pt", "--out", tmp_path / "p"]
    code, _, error = run("quantize", checkpoint, *published, *said(place))
    assert code == 2
    assert "none.pt" in error


def test_bits_of_activations_at_run_time(place: Path, tmp_path: Path, run: Run) -> None:
    def drift(*words: object) -> float:
        seen = ["--observations", place / "o.safetensors", *said(place), *words]
        pack = ["--pack", f"omega={place}/both.safetensors"]
        code, data, _ = run("compare", "--checkpoint", place / "checkpoint", *pack, *seen)
        assert code == 0
        return float(data["families"]["pi05"]["plain"]["omega"]["relative_error"])

    found = {bits: drift("--act-bits", bits) for bits in (4, 6, 8)}
    assert found[4] == drift()
    assert len(set(found.values())) == 3 and min(found.values()) > 0  # weights err here
    seen = ["--observations", place / "o.safetensors", *said(place)]
    pack = ["--pack", f"omega={place}/both.safetensors", "--backend", "native", "--act-bits", 6]
    code, _, error = run("compare", "--checkpoint", place / "checkpoint", *pack, *seen)
    assert code == 2
    assert "backend 'native' cannot run this pack" in error and "6-bit activations" in error
    play = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--episodes", 2, "--workers", 0]
    play += ["--out", tmp_path / "r", *said(place)]
    arm = ["--arm", f"omega={place}/both.safetensors", "--no-reference"]
    assert run("eval", place / "checkpoint", *play, *arm)[0] == 0
    code, _, error = run("eval", place / "checkpoint", *play, *arm, "--act-bits", 8)
    assert code == 2  # the file's records were made with 4
    assert "act_bits" in error
    code, _, error = run("eval", place / "checkpoint", *play, "--act-bits", 8)
    assert code == 2
    assert "give --arm" in error


def test_missing_layers(place: Path, tmp_path: Path, run: Run) -> None:
    checkpoint, half = place / "checkpoint", place / "action_head.safetensors"
    seen = ["--observations", place / "o.safetensors", *said(place)]
    play = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--episodes", 1, "--workers", 0]
    for words in (
        ["compare", "--checkpoint", checkpoint, "--pack", f"half={half}", *seen],
        ["bench", checkpoint, "--pack", half, "--rounds", 1, "--backends", "emulated", *seen],
        ["eval", checkpoint, *play, "--arm", f"h={half}", "--out", tmp_path / "r", *said(place)],
    ):
        code, _, error = run(*words, "--missing", "error")
        assert code == 2, words
        assert "lacks" in error
        assert "merge the other side's pack" in error
        (tmp_path / "r").unlink(missing_ok=True)
        assert run(*words)[0] == 0, words


def test_an_id_of_the_hub(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    """The Hub's cache, laid out by hand; every verb finds the folder in it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "cache/models--someone--a-policy"
    cameras = ("base", "wrist", "empty_camera_0")
    folder = write_lerobot_pi05(wide_pi05(state_dim=4), repository / "snapshots" / commit, cameras)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, data, _ = run("info", "someone/a-policy", "--offline")
    assert (code, data["path"]) == (0, str(folder))
    pack, seen = tmp_path / "p.safetensors", ["--observations", place / "o.safetensors"]
    words = [*seen, "--num-samples", 2, "--num-steps", 10, "--out", pack]
    assert run("quantize", "someone/a-policy", "--offline", *words)[0] == 0
    assert len(read_pack(pack).layers) > 20
    words = ["--checkpoint", "someone/a-policy", "--offline", "--pack", f"a={pack}", *seen]
    assert run("compare", *words)[0] == 0
    code, data, _ = run("verify", pack, "someone/a-policy", "--offline")
    assert (code, data["passed"]) == (0, True)
    code, _, error = run("info", "someone/another", "--offline")
    assert code == 2
    assert "nor in the Hugging Face cache" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "not YAML or JSON"),
        ("- a", "must be a mapping"),
        ("camera: [base]", "unknown key camera"),
    ],
)
def test_settings_that_are_none(
    place: Path, tmp_path: Path, text: str | None, message: str, run: Run
) -> None:
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    words = ["info", place / "checkpoint", "--tokenizer", place / "words.json"]
    code, _, error = run(*words, "--settings", file)
    assert code == 2
    assert message in error
