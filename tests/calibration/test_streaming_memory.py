"""What a build holds in memory, measured in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibration.helpers import tiny_samples
from omega_qvla.calibration import write_observations
from omega_qvla.policies.pi05.init import init_weights
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

_BUILD = """
import json, sys, torch
from omega_qvla.calibration import read_observations
from omega_qvla.config import preset
from omega_qvla.policies.registry import load_policy
from omega_qvla.policies.weights import open_policy
from omega_qvla.quantize import quantize_policy
torch.set_num_threads(1)
folder, samples, out, whole = sys.argv[1:]
policy, weights = (load_policy(folder), None) if whole == "whole" else open_policy(folder)
reports = []
quantize_policy(policy, preset("omega"), read_observations(samples), out=out, weights=weights,
                on_report=reports.append)
print(json.dumps(reports[0].peak_memory))
"""


@pytest.mark.slow
def test_a_build_from_the_files_holds_a_part_of_the_network(tmp_path: Path) -> None:
    """24 language layers of 8 MiB each, 4 inputs of 2048: 210 MiB of weights in float32."""
    tiny = tiny_pi05()
    config = tiny.model.config
    vlm = dataclasses.replace(config.vlm, width=256, mlp_dim=2048, depth=24)
    expert = dataclasses.replace(config.expert, depth=24)
    model = Pi05Model(dataclasses.replace(config, vlm=vlm, expert=expert))
    init_weights(model, 0)
    size = sum(p.numel() * 4 for p in model.parameters())
    policy = Pi05Policy(model.eval().requires_grad_(False), tiny.processor)
    folder = save_policy(policy, tmp_path / "checkpoint", torch.float32)
    samples = tiny_samples()
    write_observations(tmp_path / "o", samples.observations, samples.meta)

    def peak(how: str) -> int:
        arguments = [folder, tmp_path / "o", tmp_path / how, how]
        command = [sys.executable, "-c", _BUILD, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout))

    whole, parts = peak("whole"), peak("parts")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert parts < whole - 0.7 * size
