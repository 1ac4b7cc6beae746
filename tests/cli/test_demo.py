from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from cli.fakes import TASKS
from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.console import Console
from omega_qvla.cli.demo.plan import demo_plan, find_checkpoints, plan_from_arguments
from omega_qvla.cli.demo.run import run_demo
from omega_qvla.cli.main import main
from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_groot, tiny_pi05

ASSETS = Path(__file__).resolve().parents[2] / "assets"
VALUES = {"episodes", "success", "interval", "cosine", "layer_bytes", "layer_bytes_16bit"}
ARMS = {"full-precision", "rtn", "omega-paper", "omega"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("demo")
    checkpoint = save_policy(tiny_pi05(num_steps=2), folder / "assets" / "pi05")
    return demo_plan(
        folder / "out",
        {"pi05": checkpoint},
        TASKS,
        episodes=1,
        num_samples=6,
        held_out=6,
        layer_samples=2,
        env="cli.fakes:DriftEnv",
        collector="cli.fakes:collect",
    )


@pytest.fixture(scope="module")
def finished(plan: Comparison) -> Comparison:
    run_demo(plan, Console(quiet=True))
    return plan


def test_summary_has_the_promised_schema(finished: Comparison) -> None:
    summary = json.loads((finished.out / "summary.json").read_text())
    assert list(summary) == ["pi05"]
    assert list(summary["pi05"]) == ["plain", "outliers"]
    for arms in summary["pi05"].values():
        assert set(arms) == ARMS
        assert next(iter(arms)) == "full-precision"
        for arm, values in arms.items():
            assert set(values) == VALUES
            assert set(values["cosine"]) == {"mean", "median", "min"}
            assert values["episodes"] == 2
            assert values["interval"][0] <= values["success"] <= values["interval"][1]
            assert (values["layer_bytes"] == values["layer_bytes_16bit"]) == (
                arm == "full-precision"
            )


def test_outlier_channels_change_the_quantized_arms_only(finished: Comparison) -> None:
    arms = json.loads((finished.out / "summary.json").read_text())["pi05"]
    plain, outliers = arms["plain"], arms["outliers"]
    assert plain["full-precision"]["success"] == outliers["full-precision"]["success"]
    assert outliers["rtn"]["cosine"]["median"] < plain["rtn"]["cosine"]["median"]
    assert outliers["omega"]["cosine"]["median"] > outliers["rtn"]["cosine"]["median"]


def test_report_shows_every_part(finished: Comparison) -> None:
    page = (finished.out / "report.html").read_text()
    assert "was not measured in this run" not in page
    assert page.count("data:image/webp") >= 2


def test_a_second_call_does_nothing_again(
    finished: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [*finished.out.rglob("*.safetensors"), *finished.out.rglob("drift.jsonl")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    episodes = (finished.out / "episodes.jsonl").read_text()
    run_demo(finished, Console(as_json=True, quiet=True))
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert (finished.out / "episodes.jsonl").read_text() == episodes
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"] == json.loads((finished.out / "summary.json").read_text())


def test_files_of_another_demo_are_refused(finished: Comparison) -> None:
    with pytest.raises(ConfigError, match="other ratio; give another --out"):
        run_demo(dataclasses.replace(finished, ratio=10.0), Console(quiet=True))


def test_a_missing_family_is_named(plan: Comparison) -> None:
    assets = plan.checkpoints["pi05"].parent
    assert find_checkpoints(assets, ["pi05"]) == {"pi05": assets / "pi05"}
    with pytest.raises(CheckpointError, match="no checkpoint of groot_n15 in"):
        find_checkpoints(assets, ["pi05", "groot_n15"])


def test_two_checkpoints_of_one_family_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_policy(tiny_groot(), tmp_path / name)
    with pytest.raises(CheckpointError, match="both groot_n15"):
        find_checkpoints(tmp_path, ["groot_n15"])


def test_missing_assets_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--assets", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--assets" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quick_is_smaller(plan: Comparison) -> None:
    args = argparse.Namespace(
        out=plan.out,
        assets=plan.checkpoints["pi05"].parent,
        families=["pi05"],
        tasks=None,
        episodes=None,
        workers=2,
        quick=True,
    )
    quick = plan_from_arguments(args)
    args.quick = False
    full = plan_from_arguments(args)
    assert quick.env_options == full.env_options == {"size": 32}
    assert len(quick.tasks) * quick.episodes < len(full.tasks) * full.episodes
    assert quick.num_samples < full.num_samples


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.is_dir() or not any(ASSETS.iterdir()), reason="no checkpoints")
def test_quick_demo_on_the_bundled_policies(tmp_path: Path) -> None:
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary) == {"pi05", "groot_n15"}
    assert all(set(arms) == ARMS for v in summary.values() for arms in v.values())
