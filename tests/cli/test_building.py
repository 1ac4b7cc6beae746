"""Progress, ETA and the report of a build, as a person sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calibration.helpers import tiny_samples
from omega_qvla.calibration import write_observations
from omega_qvla.cli.building import LOG_EVERY, duration, follow, show_report
from omega_qvla.cli.console import Console
from omega_qvla.cli.main import main
from omega_qvla.numerics.phases import Spent, Stopwatch, phase
from omega_qvla.pack import read_pack
from omega_qvla.policies.registry import save_policy
from omega_qvla.quantize import BuildReport, Progress
from policies.tiny import tiny_pi05


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599, "59:59 min"), (3720, "1:02 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 10.0, 10.0, LOG_EVERY + 40, LOG_EVERY + 40, LOG_EVERY + 40])
    ticks: list[tuple[int, int, str]] = []
    show = follow(Console(), lambda *t: ticks.append(t), lambda: next(times))
    show(Progress("quantizing", 1, 10, "layer.a", share=0.1))
    show(Progress("quantizing", 2, 10, "layer.b", share=0.25))
    err = capsys.readouterr().err
    assert "layer.a" not in err
    # A quarter in 100 seconds: 300 more.
    assert "quantizing 2/10, 25% of the work, about 5:00 min left: layer.b" in err
    assert ticks == [(1, 10, "layer.a"), (2, 10, "layer.b")]


def test_the_report_has_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    report = BuildReport({"collect": Spent(61, 120), "round": Spent(3, 3)}, 10, 4, 3 << 30)
    data = show_report(report, Console())
    out = capsys.readouterr().out
    assert "1:01 min" in out and "2:00 min" in out and "95%" in out
    assert "4 layers built (6 more were finished before); at most 3.00 GiB of memory" in out
    assert json.loads(json.dumps(data))["phases"]["collect"] == {"wall": 61, "cpu": 120}


def test_a_phase_inside_another_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("omega_qvla.numerics.phases.time.perf_counter", lambda: float(next(now)))
    watch = Stopwatch()
    with phase("nobody looks"):
        pass
    with watch.running(), phase("outer"):
        with phase("inner"):
            pass
        with phase("inner"):
            pass
    wall = {name: spent.wall for name, spent in watch.phases.items()}
    assert wall == {"other": 2, "outer": 3, "inner": 2}


def test_the_verb_builds_in_sixteen_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_policy(tiny_pi05(), tmp_path / "checkpoint", torch.float32)
    samples = tiny_samples()
    write_observations(tmp_path / "o", samples.observations, samples.meta)
    arguments = ["quantize", str(folder), "--observations", str(tmp_path / "o"), "--json"]
    arguments += ["--num-samples", "3", "--dtype", "bfloat16", "--out", str(tmp_path / "p")]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["build"]["built"] == result["layers"]
    assert set(result["build"]["phases"]) >= {"load", "collect", "factorize", "round", "write"}
    assert read_pack(tmp_path / "p").manifest.calibration["dtype"] == "bfloat16"
