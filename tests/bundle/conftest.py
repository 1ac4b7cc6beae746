from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from calibration.helpers import tiny_samples
from omega_qvla.config import preset
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from policies.tiny import TINY


class Built(NamedTuple):
    """A checkpoint, and packs of it by recipe name."""

    family: str
    checkpoint: Path
    packs: dict[str, Path]


def build(folder: Path, family: str, dtype: torch.dtype, recipes: tuple[str, ...]) -> Built:
    checkpoint = save_policy(TINY[family](), folder / "checkpoint", dtype)
    packs = {}
    for recipe in recipes:
        policy = load_policy(checkpoint)
        out = folder / f"{recipe}.safetensors"
        packs[recipe] = quantize_policy(policy, preset(recipe), tiny_samples(2), out=out)
    return Built(family, checkpoint, packs)


@pytest.fixture(scope="session", params=list(TINY))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A 16-bit checkpoint of each family with an integer and a static per-step pack."""
    folder = tmp_path_factory.mktemp(f"bundle-{request.param}")
    return build(folder, request.param, torch.bfloat16, ("omega", "omega-paper"))
