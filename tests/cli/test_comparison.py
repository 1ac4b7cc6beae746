"""Recipes compared: on tiny checkpoints, from building to the tables."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from cli.fakes import TASKS, collect
from omega_qvla.calibration import Calibration
from omega_qvla.calibration.samples import SampleMeta, write_observations
from omega_qvla.cli.comparison import run as stages
from omega_qvla.cli.comparison.arguments import name_checkpoints
from omega_qvla.cli.comparison.arms import ArmSpec, describe, parse_arm, parse_arms
from omega_qvla.cli.comparison.cells import Builder
from omega_qvla.cli.comparison.drift import DriftMeter, DriftRecord, drift_file, read_drift
from omega_qvla.cli.comparison.loop import played, results_file
from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison
from omega_qvla.cli.comparison.run import Results, redo, run_comparison
from omega_qvla.cli.comparison.table import write_tables
from omega_qvla.cli.console import Console
from omega_qvla.cli.main import main
from omega_qvla.config import Recipe, preset
from omega_qvla.errors import ConfigError, EvaluationError, RecipeError
from omega_qvla.evaluation.open_loop import Drift
from omega_qvla.pack import read_pack
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_groot, tiny_pi05

QUIET = Console(quiet=True)
ARMS = ("rtn", "omega", "omega@2", "omega@cascade")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    return Comparison(
        folder / "out",
        {
            "pi05": save_policy(tiny_pi05(num_steps=2), folder / "pi05"),
            "groot_n15": save_policy(tiny_groot(), folder / "groot"),
        },
        parse_arms(ARMS),
        TASKS,
        (PLAIN, OUTLIERS),
        folder / "work",
        episodes=1,
        num_samples=6,
        held_out=6,
        draws=2,
        env="cli.fakes:DriftEnv",
        collector="cli.fakes:collect",
    )


@pytest.fixture(scope="module")
def finished(plan: Comparison) -> Results:
    return run_comparison(plan, QUIET)


def test_every_arm_of_every_cell_is_measured_and_played(
    plan: Comparison, finished: Results
) -> None:
    assert len(finished.drift) == len(ARMS) * 4
    for (name, variant), arms in {c: finished.summary[c[0]][c[1]] for c in plan.cells}.items():
        assert list(arms) == ["full-precision", *ARMS], (name, variant)
        assert all(values["episodes"] == 2 for values in arms.values())
    for record in finished.drift.values():
        assert record.drift.count == 12 and len(record.by_draw) == 2
        assert min(low for _, low in record.by_draw) == record.drift.cosine_min
        assert record.drift.cosine_min <= record.cosine_p01 <= record.drift.cosine_median
        assert DriftRecord.from_json(record.to_json()) == record


def test_arms_share_a_calibration_by_its_content(plan: Comparison, finished: Results) -> None:
    for cell in plan.cells:
        files = sorted(plan.folder(*cell).glob("calibration-*.safetensors"))
        counts = [Calibration.load(file).provenance["count"] for file in files]
        assert counts == [2, 6]
        found = {arm: read_pack(plan.pack(*cell, arm)).manifest.calibration for arm in ARMS}
        assert [found[a].get("count") for a in ARMS] == [None, 6, 2, 6]
        assert found["omega@cascade"]["cascade"] is True


def test_the_tables_hold_what_was_measured(plan: Comparison, finished: Results) -> None:
    files = write_tables(plan, finished)
    with files["comparison.csv"].open(newline="") as stream:
        rows = {(r["checkpoint"], r["variant"], r["arm"]): r for r in csv.DictReader(stream)}
    assert len(rows) == 4 * (1 + len(ARMS))
    for key, record in finished.drift.items():
        assert float(rows[key]["cosine_median"]) == record.drift.cosine_median
        assert int(rows[key]["layer_bytes"]) == record.layer_bytes
    text = files["comparison.md"].read_text()
    worst = finished.drift[next(iter(finished.drift))].drift.cosine_min
    assert f" / {1000 * (1 - worst):.0f} |" in text
    assert text.count("## Closed loop") == 4
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables) == {len(plan.cells) + 3, 11}
    assert json.loads(files["summary.json"].read_text()) == finished.summary


def test_a_second_run_only_reads(
    plan: Comparison, finished: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_work", lambda *_: pytest.fail("something was left to do"))
    again = run_comparison(plan, QUIET)
    assert again.summary == finished.summary


def test_an_arm_that_joins_is_the_only_one_measured(
    plan: Comparison, finished: Results, tmp_path: Path
) -> None:
    before = drift_file(plan).read_text()
    episodes = results_file(plan).read_text().splitlines()[1:]
    joined = dataclasses.replace(plan, arms=(*plan.arms, parse_arm("omega+per-token")))
    result = run_comparison(joined, QUIET)
    after = drift_file(plan).read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 4
    assert results_file(plan).read_text().splitlines()[1 : 1 + len(episodes)] == episodes
    assert "omega+per-token" in result.summary["pi05"][OUTLIERS]
    assert run_comparison(plan, QUIET).summary == finished.summary


def test_more_episodes_join(plan: Comparison, finished: Results) -> None:
    more = dataclasses.replace(plan, episodes=2)
    arms = run_comparison(more, QUIET).summary["pi05"][PLAIN]
    assert {values["episodes"] for values in arms.values()} == {4}
    assert run_comparison(plan, QUIET).summary == finished.summary


def test_tables_of_what_is_there_name_what_is_not(
    plan: Comparison, finished: Results, tmp_path: Path
) -> None:
    more = dataclasses.replace(
        plan, out=tmp_path, episodes=2, arms=(*plan.arms, parse_arm("omega+clip-1"))
    )
    drift_file(more).write_text("".join(drift_file(plan).read_text().splitlines(True)[1:]))
    lines = results_file(plan).read_text().splitlines(True)
    results_file(more).write_text("".join(lines[:-1]))
    text = write_tables(more, stages.results(more, played(more)))["comparison.md"].read_text()
    first = json.loads(drift_file(plan).read_text().splitlines()[0])["arm"]
    assert f"Not measured yet (in so many of 4 columns): {first} (1), omega+clip-1 (4)." in text
    assert text.count("Not played yet: omega+clip-1.") == 4
    assert "Unfinished: " in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratio": 10.0}, "other ratio;"),
        ({"held_out": 5}, "other samples;"),
        (
            {"arms": (ArmSpec("rtn", preset("omega")),)},
            r"other arms \(rtn\);.*--redo",
        ),
    ],
)
def test_changed_settings_are_refused(
    change: dict[str, object], named: str, plan: Comparison, finished: Results
) -> None:
    with pytest.raises(ConfigError, match=named):
        run_comparison(dataclasses.replace(plan, **change), QUIET)  # type: ignore[arg-type]


def test_recipe_fields_that_come_later_change_nothing(plan: Comparison, finished: Results) -> None:
    file = plan.out / "settings.json"
    old = file.read_text()
    settings = json.loads(old)
    del settings["arms"]["omega"]["recipe"]["backbone"]["scheme"]["activation"]["pooled"]
    file.write_text(json.dumps(settings))
    run_comparison(plan, QUIET)
    assert json.loads(file.read_text()) == json.loads(old)


@pytest.fixture
def small(plan: Comparison, tmp_path: Path) -> Comparison:
    """One cell, two arms, drift alone, in a place of its own."""
    return dataclasses.replace(
        plan,
        out=tmp_path / "out",
        work=tmp_path / "work",
        checkpoints={"pi05": plan.checkpoints["pi05"]},
        variants=(PLAIN,),
        arms=parse_arms(["rtn,omega"]),
        episodes=0,
    )


class Said:
    """Stands for the queue of a process."""

    def put(self, text: str) -> None:
        """Nobody listens."""


def inline(plan: Comparison, cells: list[stages.Cell], console: Console) -> None:
    """The cells in this process."""
    for cell in cells:
        stages.work_on(cell, Said())


def test_a_run_cut_off_anywhere_ends_with_the_same_records(
    small: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_work", inline)

    class CutError(Exception):
        pass

    whole = dataclasses.replace(small, out=small.out.parent / "whole")
    expected = run_comparison(whole, QUIET).drift
    build, measure = Builder.build, DriftMeter.measure

    def cut_build(self: Builder, arm: ArmSpec) -> float | None:
        build(self, arm)
        raise CutError

    def cut_measure(self: DriftMeter, arm: str, build_s: float | None) -> DriftRecord:
        measure(self, arm, build_s)
        raise CutError

    for method, cut in (("build", cut_build), ("measure", cut_measure)):
        with monkeypatch.context() as patch:
            owner = Builder if method == "build" else DriftMeter
            patch.setattr(owner, method, cut)
            with pytest.raises(CutError):
                run_comparison(small, QUIET)
    with drift_file(small).open("a") as stream:  # a kill in the middle of a line
        stream.write('{"checkpoint": "pi05", "var')
    found = run_comparison(small, QUIET).drift
    for key, record in expected.items():
        assert dataclasses.replace(found[key], build_s=None) == dataclasses.replace(
            record, build_s=None
        )


def test_another_pack_than_the_measured_one_is_refused_until_redone(
    small: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_work", inline)
    first = run_comparison(small, QUIET).drift
    path, line = drift_file(small), f'"pack": "{next(iter(first.values())).pack}"'
    path.write_text(path.read_text().replace(line, f'"pack": "{"0" * 64}"'))
    playing = dataclasses.replace(small, episodes=1)
    with pytest.raises(EvaluationError, match=r"not the one.*--redo rtn"):
        run_comparison(playing, QUIET)
    redo(playing, ["rtn"])
    assert not small.pack("pi05", PLAIN, "rtn").exists()
    again = run_comparison(playing, QUIET)
    assert {k: r.pack for k, r in again.drift.items()} == {k: r.pack for k, r in first.items()}
    redo(playing, ["rtn"])
    assert {r.arm for r in read_drift(path).values()} == {"omega"}
    header, *lines = results_file(playing).read_text().splitlines()
    assert "rtn" not in header and all(json.loads(line)["arm"] != "rtn" for line in lines)


@pytest.mark.parametrize("merged", [(), ("rtn",)])
def test_a_pack_of_another_recipe_under_the_name_is_made_again(
    small: Comparison, monkeypatch: pytest.MonkeyPatch, merged: tuple[str, ...]
) -> None:
    """As a preset's is after the preset has changed, where `work` is kept and `out` is not."""
    monkeypatch.setattr(stages, "_work", inline)
    plan = dataclasses.replace(small, merged=merged)
    first = run_comparison(plan, QUIET).drift
    mine = plan.pack("pi05", PLAIN, "rtn")
    for path in mine.parent.glob("rtn*.safetensors"):
        path.write_bytes(plan.pack("pi05", PLAIN, "omega").read_bytes())
    again = run_comparison(dataclasses.replace(plan, out=plan.out.parent / "afresh"), QUIET).drift
    assert {k: r.pack for k, r in again.items()} == {k: r.pack for k, r in first.items()}
    built = {key.arm for key, record in again.items() if record.build_s is not None}
    assert built == {"rtn"}


def test_an_infinite_channel_survives_the_file() -> None:
    drift = Drift(1, 0.5, 0.5, 0.5, (float("inf"), 0.25), 0, float("inf"))
    record = DriftRecord("c", "v", "a", "0", "emulated", None, 1, 4, drift, 0.5, ((0.5, 0.5),))
    assert DriftRecord.from_json(record.to_json()) == record
    with pytest.raises(EvaluationError, match="not a record of drift"):
        DriftRecord.from_json("{}")


def test_arms_by_name(tmp_path: Path) -> None:
    recipe = dataclasses.replace(preset("rtn"), name="mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    arms = parse_arms(["rtn,omega@10", f"{tmp_path}/r.yaml@cascade", "rtn"])
    assert [arm.name for arm in arms] == ["rtn", "omega@10", "mine@cascade"]
    assert arms[1].samples == 10 and arms[2].cascade and arms[2].recipe == recipe
    assert Recipe.from_dict(arms[2].settings()["recipe"]) == recipe
    assert len(parse_arms(["presets"])) >= 5 and len(parse_arms(["ablations"])) > 60
    assert describe(parse_arm("omega+no-smoothing")) == "omega with no smoothing."
    assert describe(arms[1]).endswith("Calibrated on 10 observations.")
    with pytest.raises(RecipeError, match="neither a preset"):
        parse_arm("nothing")
    with pytest.raises(ConfigError, match="'x' is neither a number"):
        parse_arm("omega@x")
    with pytest.raises(ConfigError, match="two recipes are called 'mine@cascade'"):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        parse_arms([f"{tmp_path}/r.yaml@cascade", f"{tmp_path}/s.yaml@cascade"])


def test_checkpoints_are_named_by_family_or_folder(plan: Comparison, tmp_path: Path) -> None:
    pi05, groot = plan.checkpoints.values()
    assert list(name_checkpoints([pi05, groot])) == ["pi05", "groot_n15"]
    other = save_policy(tiny_pi05(), tmp_path / "other")
    assert list(name_checkpoints([pi05, other])) == [pi05.name, "other"]
    with pytest.raises(ConfigError, match="rename a directory"):
        name_checkpoints([pi05, pi05])


def test_on_recordings_drift_alone(
    plan: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [(t, s, *item) for t in TASKS for s in (1, 2) for item in collect(t, s)]
    path = write_observations(
        tmp_path / "observations.safetensors",
        [observation for *_, observation in found],
        [SampleMeta(seed, step, task) for task, seed, step, _ in found],
        "a test",
    )
    words = ["compare", "--recipes", "rtn,omega", "--checkpoint", str(plan.checkpoints["pi05"])]
    words += ["--observations", str(path), "--calibration-samples", "4", "--num-samples", "5"]
    words += ["--out", str(tmp_path / "out"), "--layer-samples", "2", "--quiet", "--json"]
    assert main(words) == 2
    assert "--held-out" in capsys.readouterr().err
    assert main([*words, "--held-out", "0.5"]) == 0
    arms = json.loads(capsys.readouterr().out)["families"]["pi05"]["plain"]
    assert set(arms) == {"rtn", "omega"} and "success" not in arms["omega"]
    assert arms["omega"]["cosine"]["median"] > arms["rtn"]["cosine"]["median"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Success was not measured" in page and "drift alone" in page
    assert "Closed loop" not in (tmp_path / "out" / "comparison.md").read_text()


def test_a_worker_without_its_parent_stops(
    small: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def is_alive(self) -> bool:
            return False

    monkeypatch.setattr(stages, "_work", inline)
    monkeypatch.setattr(stages, "parent_process", Gone)
    assert not run_comparison(small, QUIET).drift
    assert not small.pack("pi05", PLAIN, "rtn").exists()
