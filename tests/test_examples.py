"""The examples run as they are printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_quantize_foreign() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quantize_foreign.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("12 layers quantized, run by ")
    assert lines[1] == "from the pack: the same"
    assert 0 < float(lines[2].rsplit(" ", 1)[1]) < 0.5
