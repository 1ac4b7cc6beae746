"""A comparison that is called again with something changed: nothing old passes for new."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cli.fakes import TASKS
from cli.test_comparison import QUIET, inline
from disks import file_limit
from omega_qvla.cli.comparison import run as stages
from omega_qvla.cli.comparison.arms import parse_arm, parse_arms
from omega_qvla.cli.comparison.drift import append_record, drift_file
from omega_qvla.cli.comparison.layers import layers_file, layers_measured, read_layers
from omega_qvla.cli.comparison.plan import PLAIN, Comparison
from omega_qvla.cli.comparison.report import _notes
from omega_qvla.cli.comparison.run import redo, run_comparison
from omega_qvla.cli.comparison.table import markdown
from omega_qvla.cli.main import main
from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

CELL = ("pi05", PLAIN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tiny_pi05(num_steps=2), tmp_path_factory.mktemp("resumed") / "pi05")


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(stages, "_work", inline)
    return Comparison(
        tmp_path / "out",
        {"pi05": checkpoint},
        parse_arms(["rtn,omega"]),
        TASKS,
        work=tmp_path / "work",
        episodes=0,
        num_samples=1000,
        held_out=1000,
        draws=2,
        layer_samples=2,
        env="cli.fakes:DriftEnv",
        collector="cli.fakes:collect",
    )


def test_maps_of_layers_are_of_the_arms_that_are_there(
    plan: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm that joins, is built anew or is shown instead has its own map, not an older one."""
    drift = run_comparison(plan, QUIET).drift
    file = layers_file(plan.folder(*CELL))
    before, first = file.read_bytes(), layers_measured(plan, *CELL, drift)
    assert first is not None and set(first.layers) == {"rtn", "omega"}
    run_comparison(plan, QUIET)
    assert file.read_bytes() == before

    more = dataclasses.replace(plan, arms=(*plan.arms, parse_arm("omega+per-token")))
    assert stages.work_left(more)
    joined = run_comparison(more, QUIET).drift
    found = layers_measured(more, *CELL, joined)
    assert found is not None and set(found.layers) == {"rtn", "omega", "omega+per-token"}
    assert found.layers["rtn"] == first.layers["rtn"]

    shown = dataclasses.replace(more, shown="rtn")
    assert layers_measured(shown, *CELL, joined) is None
    assert stages.work_left(shown)

    other = {k: dataclasses.replace(r, pack="0" * 64) for k, r in joined.items()}
    assert layers_measured(more, *CELL, other) is None

    plain = json.loads(file.read_text())
    del plain["packs"], plain["shown"], plain["hurt"]  # as they were written once
    file.write_text(json.dumps(plain))
    assert read_layers(plan.folder(*CELL)) is None and stages.work_left(more)


def test_the_numbers_of_observations_are_those_that_there_were(plan: Comparison) -> None:
    """The experts' episodes hold fewer than the thousand asked for, and nothing says a thousand."""
    found = run_comparison(dataclasses.replace(plan, layer_samples=0), QUIET)
    count = next(iter(found.drift.values())).drift.count
    assert 0 < count < 1000 and count % 2 == 0
    text = markdown(plan, found)
    assert f"of {count} chunks ({count // 2} held-out observations, 2 noise" in text
    notes = " ".join(_notes(plan, found))
    assert f"drift on {count // 2} others, 2 noises each" in notes
    assert "1000" not in text + notes
    assert "scripted experts" not in notes and "(cli.fakes:collect)" in notes


def test_redoing_forgets_nothing_of_another_comparison(plan: Comparison) -> None:
    plan = dataclasses.replace(plan, layer_samples=0)
    run_comparison(plan, QUIET)
    before = drift_file(plan).read_bytes()
    with pytest.raises(ConfigError, match=r"no arm omgea in .*; there are full-precision, omega"):
        redo(plan, ["omgea"])
    with pytest.raises(ConfigError, match="other ratio"):
        redo(dataclasses.replace(plan, ratio=10.0), ["omega"])
    assert drift_file(plan).read_bytes() == before
    assert plan.pack(*CELL, "omega").exists()


def test_redoing_builds_the_merged_parts_again_too(plan: Comparison) -> None:
    plan = dataclasses.replace(plan, layer_samples=0, merged=("omega",))
    run_comparison(plan, QUIET)
    parts = plan.parts(*CELL, "omega")
    assert all(part.exists() for part in parts)
    unfinished = plan.pack(*CELL, "omega").with_name("omega.safetensors.partial")
    unfinished.mkdir()
    redo(plan, ["omega"])
    assert not any(part.exists() for part in (*parts, unfinished, plan.pack(*CELL, "omega")))
    assert plan.pack(*CELL, "rtn").exists()


def test_a_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    path = tmp_path / "drift.jsonl"
    append_record(path, "a" * 600)
    with file_limit(1000), pytest.raises(EvaluationError, match="cannot take another record"):
        append_record(path, "b" * 600)
    assert path.read_text() == "a" * 600 + "\n"
    append_record(path, "c")
    assert path.read_text().endswith("a\nc\n")


def test_a_checkpoint_in_several_files_is_known_by_all_of_them(
    plan: Comparison, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for i in (1, 2):
        (folder / f"model-0000{i}-of-00002.safetensors").write_bytes(b"weights")
    mine = dataclasses.replace(plan, checkpoints={"pi05": folder})
    before = mine.settings()["checkpoints"]
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"other")
    assert mine.settings()["checkpoints"] != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtn@2@10", "says twice how"),
        ("omega@cascade@cascade", "says twice how"),
        ("rtn@²", "neither a number"),
    ],
)
def test_how_an_arm_is_calibrated_is_said_once(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arm(text)


@pytest.mark.parametrize("name", ["mine/first", "full-precision", "../out"])
def test_arms_are_named_so_that_files_can_be(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: {name}\nbackbone: {{scheme: {{}}}}\naction_head: null\n")
    with pytest.raises(ConfigError, match="results and packs are named after it"):
        parse_arm(str(path))


@pytest.mark.parametrize(
    "words", [["--act-bits", "8"], ["--missing", "error"], ["--arms", "rtn"], ["--execute", "3"]]
)
def test_options_that_recipes_would_ignore_are_refused(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(["compare", "--recipes", "rtn", *place, *words]) == 2
    assert f"{words[0]}: of no use with --recipes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
