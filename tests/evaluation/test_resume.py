"""Killed three times at random moments, a run ends with the file of an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omega_qvla.evaluation.results import read_results

from .slow_run import EPISODES

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 2 * EPISODES  # two arms
KILLS = 3


def start(kind, folder, *address):
    """The run as a process of its own, its workers' last words put aside."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.slow_run", kind, str(folder), *address],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        stderr=(folder / "stderr").open("w"),
    )


def prepare(folder):
    folder.mkdir()
    (folder / "full-precision").write_text("1")
    (folder / "omega").write_text("-1")
    return folder


def lines(folder):
    results = folder / "results.jsonl"
    return results.read_bytes().count(b"\n") - 1 if results.exists() else 0


def kill_at(process, folder, records, delay):
    """SIGKILL once there are so many records, and a moment later."""
    end = time.monotonic() + 600
    while process.poll() is None and lines(folder) < records and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()


def content(folder):
    header, records = read_results(folder / "results.jsonl")
    return header, [record.outcome() for record in records]


def killed_and_resumed(kind, tmp_path, *address):
    moments = random.Random(f"{kind}-7")
    whole = prepare(tmp_path / "whole")
    assert start("process", whole).wait() == 0, (whole / "stderr").read_text()
    # The same folder name for both: the header keeps the paths for replays.
    whole.rename(tmp_path / "undisturbed")
    folder = prepare(tmp_path / "whole")
    marks = sorted(moments.sample(range(1, TOTAL - 2), KILLS))
    seen = []
    for mark in marks:
        kill_at(start(kind, folder, *address), folder, mark, moments.uniform(0, 0.15))
        seen.append(lines(folder))
    assert all(count < TOTAL for count in seen), f"killed too late: {seen}"
    assert seen == sorted(seen) and seen[-1] >= marks[-1], "a resumed run lost records"
    assert start(kind, folder, *address).wait() == 0, (folder / "stderr").read_text()
    assert content(folder) == content(tmp_path / "undisturbed")
    raw = (folder / "results.jsonl").read_bytes()
    assert raw.count(b"\n") == TOTAL + 1 and raw.endswith(b"\n")


@pytest.mark.parametrize("kind", ["process", "pool"])
def test_three_kills_change_nothing(kind, tmp_path):
    killed_and_resumed(kind, tmp_path)


@pytest.mark.ray
def test_three_kills_change_nothing_on_ray(ray, tmp_path):
    killed_and_resumed("ray", tmp_path, ray.get_runtime_context().gcs_address)
