"""The examples run as they are printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from omega_qvla.policies.registry import save_policy
from omega_qvla.runtime.engine import Engine
from omega_qvla.runtime.recorder import Recorder
from policies.tiny import tiny_groot, tiny_observation

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *words: object) -> list[str]:
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *words]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_quantize_foreign() -> None:
    lines = run("quantize_foreign")
    assert lines[0].startswith("12 layers quantized, run by ")
    assert lines[1] == "from the pack: the same"
    assert 0 < float(lines[2].rsplit(" ", 1)[1]) < 0.5


def test_build_a_pack_and_let_it_act(tmp_path: Path) -> None:
    """Record with the original, build from that, act with the bundle and record again."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    save_policy(tiny_groot(num_steps=2), checkpoint)
    engine = Engine.load(checkpoint)
    with Recorder(tmp_path / "first") as engine.recorder:
        for episode in range(3):
            engine.recorder.begin(task="any")
            for i in range(6):
                engine.infer(tiny_observation(10 * episode + i))
    lines = run("build_pack", checkpoint, tmp_path / "first", out)
    assert lines[0].endswith("checks hold")
    assert lines[1].startswith("bundle: ")
    lines = run("robot_loop", out / "bundle", tmp_path / "second")
    assert lines[0].startswith("groot_n15, its quantized layers run by ")
    assert lines[1] == "recorded 30 observations, lost 0"
    lines = run("robot_loop", checkpoint, tmp_path / "third", out / "omega.safetensors")
    assert lines[1] == "recorded 30 observations, lost 0"
    same = [(tmp_path / name).rglob("*.safetensors") for name in ("second", "third")]
    for one, other in zip(*map(sorted, same), strict=True):
        assert one.read_bytes() == other.read_bytes()  # the bundle acts as the pack, bit for bit
