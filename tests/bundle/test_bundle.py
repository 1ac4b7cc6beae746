"""A bundle is the checkpoint with its pack: bit for bit where nothing lossy was asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bundle.conftest import Built, build
from omega_qvla.bundle import BundleOptions, load_bundle, predict_sizes, read_bundle, write_bundle
from omega_qvla.bundle.families import blank_policy, time_linears
from omega_qvla.config import preset
from omega_qvla.errors import BundleError, CheckpointError, PackError, StepError
from omega_qvla.modules.linear import QuantLinear, replace_linears
from omega_qvla.pack import read_pack
from omega_qvla.pack.files import read_header
from omega_qvla.policies.files import read_json
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from omega_qvla.runtime.engine import Engine
from policies.tiny import TINY, tiny_observation

ALL_INT8 = BundleOptions(embed="int8", vision="int8", connector="int8")
STEPS = {"pi05": 10, "groot_n15": 4}


def actions(engine: Engine, seed: int = 3) -> np.ndarray:
    return np.stack([engine.infer(tiny_observation(i), seed=seed + i) for i in range(2)])


def reference(built: Built, recipe: str) -> np.ndarray:
    return actions(Engine.load(built.checkpoint, built.packs[recipe]))


@pytest.mark.parametrize("recipe", ["omega", "omega-paper"])
@pytest.mark.parametrize("baked", [False, True])
def test_actions_are_those_of_checkpoint_and_pack(
    built: Built, recipe: str, baked: bool, tmp_path: Path
) -> None:
    options = BundleOptions(bake_steps=STEPS[built.family] if baked else None)
    write_bundle(built.checkpoint, built.packs[recipe], tmp_path / "bundle", options)
    engine = Engine.load(tmp_path / "bundle")
    assert engine.report is not None
    assert engine.report.layers == len(read_pack(built.packs[recipe]).layers)
    np.testing.assert_array_equal(actions(engine), reference(built, recipe))


@pytest.mark.parametrize("family", list(TINY))
def test_a_float32_checkpoint_stays_float32(family: str, tmp_path: Path) -> None:
    wide = build(tmp_path, family, torch.float32, ("w4a16",))
    write_bundle(wide.checkpoint, wide.packs["w4a16"], tmp_path / "keep")
    np.testing.assert_array_equal(actions(Engine.load(tmp_path / "keep")), reference(wide, "w4a16"))
    narrow = BundleOptions(rest="bfloat16")
    write_bundle(wide.checkpoint, wide.packs["w4a16"], tmp_path / "narrow", narrow)
    expected, found = reference(wide, "w4a16"), actions(Engine.load(tmp_path / "narrow"))
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    manifests = (read_bundle(tmp_path / name) for name in ("keep", "narrow"))
    kept, halved = (m.files["rest.safetensors"].bytes for m in manifests)
    assert halved < 0.55 * kept


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """It would become infinite, and every action with it."""
    policy = TINY["pi05"]()
    name, parameter = next(
        item for item in policy.module.named_parameters() if item[0].endswith("layer_norm2.bias")
    )
    for value, fits in ((65504.0, True), (65536.0, False)):
        with torch.no_grad():
            parameter[0] = value
        folder = tmp_path / str(fits)
        checkpoint = save_policy(policy, folder / "checkpoint", torch.float32)
        pack = quantize_policy(policy, preset("rtn"), None, out=folder / "p")
        write = partial(write_bundle, checkpoint, pack, folder / "b", BundleOptions("float16"))
        if fits:
            write()
            continue
        said = rf"{name} holds a value of 65536 .* ends at 65504"
        with pytest.raises(CheckpointError, match=said):
            write()
        assert not (folder / "b").exists()
        with pytest.raises(CheckpointError, match=said):
            save_policy(policy, folder / "narrow", torch.float16)
        assert not (folder / "narrow" / "model.safetensors").exists()


def test_what_is_not_needed_is_not_there(built: Built, tmp_path: Path) -> None:
    steps = STEPS[built.family]
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "a")
    write_bundle(
        built.checkpoint, built.packs["omega"], tmp_path / "b", BundleOptions(bake_steps=steps)
    )
    full = load_policy(built.checkpoint)
    names = {n: set(read_header(tmp_path / n / "rest.safetensors").entries) for n in "ab"}
    quantized = set(read_pack(built.packs["omega"]).layers)
    gone = quantized | set(full.unused_linears())
    assert not any(name.rpartition(".")[0] in gone for name in names["a"])
    time = set(time_linears(full))
    assert len(time) >= 5
    assert all(f"{name}.weight" in names["a"] for name in time)
    assert not any(name.rpartition(".")[0] in time for name in names["b"])
    if built.family == "groot_n15":
        entries = read_header(tmp_path / "a" / "rest.safetensors").entries
        assert full.module.state_dict()["action_head.action_encoder.W2.W"].shape[0] == 2
        assert entries["action_head.action_encoder.W2.W"].shape[0] == 1


def test_another_number_of_steps_than_baked(built: Built, tmp_path: Path) -> None:
    steps = STEPS[built.family]
    options = BundleOptions(bake_steps=steps)
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "bundle", options)
    policy, _ = load_bundle(tmp_path / "bundle")
    prefix = policy.encode(policy.prepare([tiny_observation()]))
    noise = policy.draw_noise(1, 0)
    with pytest.raises(StepError, match=f"baked for {steps} denoising steps"):
        policy.sample(prefix, noise, num_steps=steps + 1)
    with pytest.raises(PackError, match="denoising steps"):  # its scales are a table of steps
        write_bundle(
            built.checkpoint,
            built.packs["omega-paper"],
            tmp_path / "other",
            BundleOptions(bake_steps=steps + 1),
        )


def test_baking_another_number_makes_it_the_policys(built: Built, tmp_path: Path) -> None:
    options = BundleOptions(bake_steps=3)
    manifest = write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "three", options)
    policy, _ = load_bundle(tmp_path / "three")
    assert policy.num_steps == manifest.num_steps == 3
    source = Engine.load(built.checkpoint, built.packs["omega"], fast=False).policy
    prefix = source.encode(source.prepare([tiny_observation()]))
    expected = source.sample(prefix, source.draw_noise(1, 0), num_steps=3)
    prefix = policy.encode(policy.prepare([tiny_observation()]))
    assert torch.equal(policy.sample(prefix, policy.draw_noise(1, 0)), expected)


def test_int8_parts_are_small_and_near(built: Built, tmp_path: Path) -> None:
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "wide")
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "int8", ALL_INT8)
    wide, small = (read_bundle(tmp_path / name).parts for name in ("wide", "int8"))
    assert small["embedding table"] < 0.55 * wide["embedding table"]
    assert small["vision tower"] < 0.85 * wide["vision tower"]  # patches stay wide
    assert small["connector"] < 0.65 * wide["connector"]
    assert small["everything else"] == wide["everything else"]
    expected, found = reference(built, "omega"), actions(Engine.load(tmp_path / "int8"))
    # Measured: 0.05 (pi0.5) and 0.01 (GR00T); 4-bit activations turn small moves into steps.
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.15


def test_quantized_layers_are_never_wide(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "bundle")
    places: list[set[str]] = []

    def spy(module: nn.Module, *args: object) -> object:
        places.append({tensor.device.type for tensor in module.state_dict().values()})
        return replace_linears(module, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("omega_qvla.bundle.reader.replace_linears", spy)
    policy, _ = load_bundle(tmp_path / "bundle")
    assert places == [{"meta"}]  # nothing had memory when they were put in place
    quantized = [m for m in policy.module.modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == len(read_pack(built.packs["omega"]).layers)
    assert not any(tensor.is_meta for tensor in policy.module.state_dict().values())
    assert not any(parameter.requires_grad for parameter in policy.module.parameters())


@pytest.mark.parametrize(
    "options", [BundleOptions(), BundleOptions("bfloat16", "int8", "int8", "int8", bake_steps=5)]
)
def test_predicted_sizes_are_those_written(
    built: Built, options: BundleOptions, tmp_path: Path
) -> None:
    manifest = write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "b", options)
    config = read_json(built.checkpoint / "config.json")
    blank = blank_policy(built.family, config, built.checkpoint, one_embodiment=True)
    assert predict_sizes(blank, preset("omega"), options) == manifest.parts
    stored = sum(manifest.files[n].bytes for n in ("pack.safetensors", "rest.safetensors"))
    assert sum(manifest.parts.values()) < stored  # headers come on top


def test_a_16_bit_engine(built: Built, tmp_path: Path) -> None:
    options = BundleOptions("keep", "int8", "int8", "int8", bake_steps=STEPS[built.family])
    write_bundle(built.checkpoint, built.packs["omega"], tmp_path / "b", options)
    found = actions(Engine.load(tmp_path / "b", dtype=torch.bfloat16))
    expected = reference(built, "omega")
    assert np.linalg.norm(found - expected) < 0.3 * np.linalg.norm(expected)


def test_refused_before_anything_is_written(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    other = save_policy(TINY[built.family](seed=8), tmp_path / "other")
    with pytest.raises(PackError, match="another checkpoint"):
        write_bundle(other, built.packs["omega"], out)
    with pytest.raises(CheckpointError):
        write_bundle(tmp_path, built.packs["omega"], out)
    broken = tmp_path / "cut"
    broken.write_bytes(built.packs["omega"].read_bytes()[:-1])
    with pytest.raises(PackError, match="truncated"):
        write_bundle(built.checkpoint, broken, out)
    for bad in ({"embed": "int4"}, {"rest": "float64"}, {"bake_steps": 0}):
        with pytest.raises(BundleError):
            BundleOptions(**bad)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "other"]
    out.mkdir()
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(built.checkpoint, built.packs["omega"], out)
