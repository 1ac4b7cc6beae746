"""The bundled policies: what the repository promises about the files themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.calibration.samples import ObservationSet, SampleMeta
from omega_qvla.config.presets import preset, resolve_recipe
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
from omega_qvla.policies.targets import select_targets
from omega_qvla.quantize import quantize_policy

ASSETS = Path(__file__).parents[1] / "assets"
CHECKPOINTS = {"pi05": "pi05-metaworld", "groot_n15": "groot-n15-metaworld"}


def observations(count: int) -> ObservationSet:
    rng = np.random.default_rng(0)
    made = [
        Observation(
            {name: rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for name in ("base", "wrist")},
            np.array([0.0, 0.6, 0.2, 1.0], np.float32),
            "open the drawer",
        )
        for _ in range(count)
    ]
    return ObservationSet(tuple(made), tuple(SampleMeta(i, 0) for i in range(count)), "random")


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_layout_size_and_card(family: str) -> None:
    folder = ASSETS / CHECKPOINTS[family]
    assert (folder / "model.safetensors").stat().st_size < 30e6
    assert "95% interval" in (folder / "README.md").read_text()
    policy = load_policy(folder)
    assert policy.family == family
    assert policy.num_steps == {"pi05": 10, "groot_n15": 4}[family]


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_every_quantized_width_is_a_multiple_of_64(family: str) -> None:
    policy = load_policy(ASSETS / CHECKPOINTS[family])
    recipe = preset("omega")
    for side in ("backbone", "action_head"):
        side_recipe = recipe.side(side)
        assert side_recipe is not None
        for name, _ in select_targets(policy, side_recipe, side, False):
            weight = policy.module.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            assert weight.shape[0] % 64 == 0 and weight.shape[1] % 64 == 0, name


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_an_omega_pack_takes_at_most_three_tenths_of_16_bit(family: str, tmp_path: Path) -> None:
    policy = load_policy(ASSETS / CHECKPOINTS[family])
    pack = read_pack(
        quantize_policy(policy, preset("omega"), observations(2), out=tmp_path / "pack")
    )
    sizes = pack.sizes()
    assert sizes.layer_bytes <= 0.28 * sizes.layer_bytes_16bit
    # The file with everything in it: hashes of every tensor, recipe, provenance.
    assert sizes.file_bytes == (tmp_path / "pack").stat().st_size
    assert sizes.file_bytes <= 0.30 * sizes.layer_bytes_16bit


def test_omega_r32_takes_the_bytes_of_svdquant(tmp_path: Path) -> None:
    """Measured: 50.0% of 16 bits both."""
    policy = load_policy(ASSETS / CHECKPOINTS["pi05"])
    recipe = resolve_recipe("omega-r32+weights-rtn")  # as large, and quicker
    sizes = read_pack(
        quantize_policy(policy, recipe, observations(1), out=tmp_path / "r32")
    ).sizes()
    assert 0.48 * sizes.layer_bytes_16bit < sizes.layer_bytes <= 0.505 * sizes.layer_bytes_16bit


def test_the_policy_for_libero_shrinks_its_pictures_and_says_what_they_were() -> None:
    folder = ASSETS / "libero" / "pi05-object"
    assert (folder / "model.safetensors").stat().st_size < 17e6
    card = (folder / "README.md").read_text()
    assert "**substitutes**" in card and "95% interval" in card
    policy = load_policy(folder)
    rng = np.random.default_rng(0)
    shown = {
        name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in ("base", "wrist")
    }
    start = np.array([-0.15, 0.0, 0.26, 3.14, 0.0, -0.09, 0.039, -0.039], np.float32)
    prompt = "pick up the milk and place it in the basket"
    chunk = policy.infer(Observation(shown, start, prompt))
    assert chunk.shape == (10, 7)
    # Every word of the instruction is one that it knows.
    tokens, _ = policy.processor.tokenize([prompt], start[None])
    assert policy.processor.tokenizer.token_to_id("<unk>") not in tokens
