"""A bundle is the same folder whatever layout its checkpoint came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file

from bundle.conftest import Built
from omega_qvla.bundle import BundleOptions, read_bundle, write_bundle
from omega_qvla.calibration import ObservationSet, SampleMeta
from omega_qvla.config import preset
from omega_qvla.errors import BundleError, CheckpointError, ConfigError, PackError
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine
from policies.layouts import (
    observation,
    wide_pi05,
    write_isaac,
    write_lerobot_groot,
    write_lerobot_pi05,
    write_openpi,
)
from policies.tiny import CAMERAS, tiny_groot, tiny_pi05


class Layout(NamedTuple):
    """How a checkpoint is written, what must be said to load it, and images it has to fit."""

    write: Callable[[Path], Path]
    settings: Mapping[str, Any] | None
    cameras: tuple[str, ...]
    edge: int


_OPENPI = {"base_0_rgb": "base", "left_wrist_0_rgb": "wrist", "right_wrist_0_rgb": None}
LAYOUTS = {
    "openpi": Layout(
        lambda p: write_openpi(tiny_pi05(), p / "c"), {"cameras": _OPENPI}, CAMERAS, 40
    ),
    "lerobot_pi05": Layout(
        lambda p: write_lerobot_pi05(wide_pi05(state_dim=4), p / "c", (*CAMERAS, "empty_camera_0")),
        None,
        CAMERAS,
        50,
    ),
    "isaac": Layout(
        lambda p: write_isaac(tiny_groot(), p / "c"), {"embodiment_id": 1}, CAMERAS, 48
    ),
    "lerobot_groot": Layout(
        lambda p: write_lerobot_groot(tiny_groot(), p / "c", p / "base"), None, CAMERAS, 36
    ),
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def see(layout: Layout, seed: int) -> Observation:
    seen: Observation = observation(seed, 4, layout.cameras, layout.edge)
    return seen


def build(layout: Layout, folder: Path) -> tuple[Path, Path]:
    """(checkpoint, pack)."""
    checkpoint = layout.write(folder)
    policy = load_policy(checkpoint, settings=layout.settings)
    samples = ObservationSet(
        tuple(see(layout, i) for i in range(2)), tuple(SampleMeta(i, 0, "t") for i in range(2))
    )
    pack = folder / "pack.safetensors"
    return checkpoint, quantize_policy(policy, preset("omega"), samples, out=pack)


@pytest.mark.parametrize("baked", [False, True])
def test_each_layout_acts_the_same_from_its_bundle(
    layout: Layout, baked: bool, tmp_path: Path
) -> None:
    checkpoint, pack = build(layout, tmp_path)
    source = Engine.load(checkpoint, pack, settings=layout.settings)
    options = BundleOptions(bake_steps=source.policy.num_steps if baked else None)
    out = tmp_path / "bundle"
    write_bundle(checkpoint, pack, out, options, settings=layout.settings)
    checkpoint.rename(tmp_path / "gone")  # it stands alone, and knows its settings
    bundled = Engine.load(out)
    assert bundled.policy.cameras == source.policy.cameras
    for seed in range(2):
        expected = source.infer(see(layout, seed), seed=seed)
        np.testing.assert_array_equal(bundled.infer(see(layout, seed), seed=seed), expected)


def test_settings_must_be_said_once(tmp_path: Path) -> None:
    layout = LAYOUTS["isaac"]
    checkpoint, pack = build(layout, tmp_path)
    with pytest.raises(CheckpointError, match="embodiments"):
        write_bundle(checkpoint, pack, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    write_bundle(checkpoint, pack, tmp_path / "bundle", settings=layout.settings)
    assert read_bundle(tmp_path / "bundle").embodiment == 1
    tensors = load_file(tmp_path / "bundle" / "rest.safetensors")
    assert tensors["action_head.action_encoder.W2.W"].shape[0] == 1
    with pytest.raises(BundleError, match="own settings"):
        Engine.load(tmp_path / "bundle", settings=layout.settings)


def test_bits_and_completeness_of_a_bundle(built: Built, tmp_path: Path) -> None:
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "b")
    seen = see(LAYOUTS["isaac"], 0)
    seen = Observation({c: i[:32, :32] for c, i in seen.images.items()}, seen.state, seen.prompt)
    wide = Engine.load(built.checkpoint, built.packs["omega"], act_bits=8)
    same = Engine.load(tmp_path / "b", act_bits=8, missing="error")
    np.testing.assert_array_equal(same.infer(seen), wide.infer(seen))
    assert not np.array_equal(same.infer(seen), Engine.load(tmp_path / "b").infer(seen))
    with pytest.raises(ConfigError, match="no pack"):
        Engine.load(built.checkpoint, act_bits=8)
    side = tmp_path / "side.safetensors"
    quantize_policy(
        load_policy(built.checkpoint), preset("rtn"), None, out=side, sides=["action_head"]
    )
    write_bundle(built.checkpoint, side, tmp_path / "half")
    Engine.load(tmp_path / "half")
    with pytest.raises(PackError, match="lacks"):
        Engine.load(tmp_path / "half", missing="error")
