"""Datasets on the command line: build, compare on held-out episodes, sweep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra `lerobot`")
pytest.importorskip("av", reason="needs the extra `lerobot`")

from calibration.lerobot_files import CAMERAS, DatasetSpec, write_v21
from omega_qvla.calibration.sources.base import DEFAULT_HELD_OUT
from omega_qvla.cli.main import main
from omega_qvla.cli.parsing import HELD_OUT
from omega_qvla.pack import read_pack, write_pack
from omega_qvla.policies.registry import save_policy
from policies.tiny import IMAGE_SIZE, tiny_pi05

SPEC = DatasetSpec(size=(IMAGE_SIZE, IMAGE_SIZE))
BASE = ["--camera", f"base={CAMERAS[0]}"]  # `wrist` is found by its name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    save_policy(tiny_pi05(num_steps=2), folder / "checkpoint")
    write_v21(folder / "dataset", SPEC)
    write_v21(folder / "large", dataclasses.replace(SPEC, size=(48, 48)))
    return folder


def test_a_sweep_is_nested_and_measured_on_unseen_episodes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", f"{place}/checkpoint", "--dataset", f"{place}/dataset", *BASE]
    words += ["--sweep", "6,2", "--drift-samples", "4"]
    assert main([*words, "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["samples"] for row in data["sweep"]] == [2, 6]
    assert all(0.5 < row["cosine"]["median"] <= 1 for row in data["sweep"])
    assert len(data["held_out"]) == 4
    seen = {episode for _, episode, _ in data["calibration"]}
    assert not seen & {episode for _, episode, _ in data["held_out"]}


def test_a_sweep_whose_packs_could_not_run_is_refused_before_the_first(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", f"{place}/checkpoint", "--dataset", f"{place}/dataset", *BASE]
    words += ["--sweep", "2", "--drift-samples", "2", "--num-steps", "3"]
    assert main([*words, "--recipe", "omega", "--recipe", "omega-paper"]) == 2
    told = capsys.readouterr().err
    assert "recipe 'omega-paper' has static scales" in told and "the checkpoint's 2" in told
    assert "loading" not in told


def test_a_pack_records_its_steps_and_is_compared_on_others(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--dataset", f"{place}/dataset", *BASE]
    for name, held_out in (("fair", "0.2"), ("unfair", "0")):
        words = ["quantize", f"{place}/checkpoint", *source, "--num-samples", "4"]
        words += ["--held-out", held_out, "--out", f"{place}/{name}.safetensors", "--quiet"]
        assert main(words) == 0
    capsys.readouterr()
    assert main(["inspect", f"{place}/fair.safetensors", "--json"]) == 0
    calibration = json.loads(capsys.readouterr().out)["calibration"]
    assert calibration["count"] == len(calibration["samples"]) == 4
    assert calibration["token_cap"] == 512  # the published one of pi0.5
    assert calibration["source"].startswith("LeRobot v2.1 dataset dataset; cameras base=")
    words = ["compare", "--checkpoint", f"{place}/checkpoint", *source, "--quiet"]
    words += ["--num-samples", "4"]
    assert main([*words, "--pack", f"fair={place}/fair.safetensors"]) == 0
    assert main([*words, "--pack", f"unfair={place}/unfair.safetensors"]) == 2
    assert "'unfair' was calibrated on held-out episode(s)" in capsys.readouterr().err
    layers = ["--layers", "--checkpoint", f"{place}/checkpoint", *source, "--no-sensitivity"]
    assert main(["inspect", f"{place}/unfair.safetensors", *layers, "--quiet"]) == 2
    assert "was calibrated on held-out episode(s)" in capsys.readouterr().err
    assert main(["inspect", f"{place}/fair.safetensors", *layers, "--observations", "x"]) == 2
    assert "one of --observations and --dataset, not both" in capsys.readouterr().err
    # Of a merged pack, every part's calibration counts.
    unfair = read_pack(place / "unfair.safetensors")
    parts = {"parts": [{"source": "elsewhere"}, dict(unfair.manifest.calibration)]}
    merged = dataclasses.replace(unfair.manifest, calibration=parts)
    write_pack(place / "merged.safetensors", merged, unfair.layers)
    assert main([*words, "--pack", f"merged={place}/merged.safetensors"]) == 2
    assert "'merged' was calibrated on held-out episode(s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "{place}/dataset"], "no camera 'base'; it has: observation.images.front"),
        (["--dataset", "{place}/dataset", "--camera", "base=x"], "no camera 'x' (for 'base')"),
        (["--dataset", "{place}/large", *BASE], "got uint8 [48, 48, 3], wanted uint8 [32, 32, 3]"),
        (["--dataset", "{place}/dataset", *BASE, "--state-key", "observation.state=0"], "state:"),
        (["--dataset", "{place}/dataset", *BASE, "--state-key", "s=x"], "KEY=0:7,22"),
        (["--dataset", "{place}/dataset", "--observations", "x"], "not both"),
        (["--observations", "x", *BASE], "--camera and --state-key go with"),
    ],
)
def test_calibrate_refuses(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(place=place) for word in words]
    out = ["--out", f"{place}/c", "--num-samples", "2", "--quiet"]
    assert main(["calibrate", f"{place}/checkpoint", *words, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "c").exists()


def test_the_help_tells_the_truth() -> None:
    assert HELD_OUT == DEFAULT_HELD_OUT


def test_an_episode_in_open_loop(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--dataset", f"{place}/dataset", *BASE]
    words = ["quantize", f"{place}/checkpoint", *source, "--num-samples", "4", "--quiet"]
    assert main([*words, "--out", f"{place}/open.safetensors"]) == 0
    capsys.readouterr()
    words = ["compare", "--checkpoint", f"{place}/checkpoint", *source, "--json", "--quiet"]
    words += ["--pack", f"omega={place}/open.safetensors", "--out", str(tmp_path / "out")]
    assert main([*words, "--episode", "1", "--execute", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["episode"] == 1 and set(data["arms"]) == {"full-precision", "omega"}
    assert data["steps"] == list(range(0, SPEC.episodes[1][1], 2))
    assert data["arms"]["full-precision"]["error"] == 0 < data["arms"]["omega"]["error"]
    for name in ("html", "md", "csv", "json"):
        assert (tmp_path / "out" / f"open-loop.{name}").stat().st_size > 100
    # Options of the pack and of the checkpoint are not left out in silence.
    assert main([*words, "--episode", "1", "--execute", "2", "--act-bits", "8"]) == 0
    finer = json.loads(capsys.readouterr().out)["arms"]
    assert finer["omega"]["error"] < data["arms"]["omega"]["error"]
    assert main([*words, "--episode", "1", "--settings", f"{tmp_path}/missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err
    assert main([*words, "--episode", "1", "--pack", f"full-precision={place}/x"]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert main([*words, "--episode", "99"]) == 2
    assert "no episode 99" in capsys.readouterr().err
    assert main([*words, "--episode", "1", "--action-key", "nothing"]) == 2
    assert "no 'nothing'; it has" in capsys.readouterr().err
