"""`omega-qvla serve` as a process, with a client."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.evaluation.remote import RemotePolicy
from omega_qvla.policies.registry import load_policy, save_policy
from policies.tiny import tiny_observation, tiny_pi05

pytest.importorskip("msgpack", reason="the extra [serve] is not installed")
pytest.importorskip("websockets", reason="the extra [serve] is not installed")


def test_serves_records_and_says_so_when_it_is_stopped(tmp_path: Path) -> None:
    save_policy(tiny_pi05(num_steps=2), tmp_path / "checkpoint")
    words = ["serve", tmp_path / "checkpoint", "--port", "0", "--record", tmp_path / "kept"]
    start = "import sys; from omega_qvla.cli.main import main; sys.exit(main(sys.argv[1:]))"
    server = subprocess.Popen(
        [sys.executable, "-c", start, *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        said = ""
        while (found := re.search(r"ws://127\.0\.0\.1:\d+", said)) is None:
            line = server.stderr.readline()
            assert line, f"ended before it served:\n{said}"
            said += line
        remote = RemotePolicy(found.group())
        expected = load_policy(tmp_path / "checkpoint").infer(tiny_observation(0), seed=3)
        np.testing.assert_allclose(
            remote.infer(tiny_observation(0), seed=3), expected, rtol=0, atol=1e-4
        )
        remote.close()
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
    finally:
        server.kill()
    assert "1 observations recorded, 0 lost" in rest and "interrupted" in rest
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 1
