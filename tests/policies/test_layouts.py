"""Checkpoints as openpi, LeRobot and Isaac-GR00T write them: what agrees and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.policies.images import lerobot_resize, resize_with_pad, squash_bicubic, to_float
from omega_qvla.policies.pi05.config import IMAGE_SLOTS
from omega_qvla.policies.registry import load_policy, save_policy
from policies.layouts import (
    observation,
    wide_pi05,
    write_isaac,
    write_lerobot_groot,
    write_lerobot_pi05,
    write_openpi,
)
from policies.tiny import CAMERAS, tiny_groot, tiny_observation, tiny_pi05

TOLERANCE = 2e-5
SLOTS = {"cameras": {**dict(zip(IMAGE_SLOTS, CAMERAS, strict=False)), IMAGE_SLOTS[2]: None}}


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_openpi_without_our_file_gives_the_same_actions(tmp_path: Path) -> None:
    policy = tiny_pi05()
    path = write_openpi(policy, tmp_path / "p")
    loaded = load_policy(path, settings=SLOTS)
    close(loaded.infer(tiny_observation()), policy.infer(tiny_observation()))
    alone = load_policy(path)
    assert alone.cameras == IMAGE_SLOTS
    assert alone.processor.config.asset_id == "our/robot"
    assert alone.processor.config.resize
    save_policy(alone, tmp_path / "q", torch.float32)
    seen = observation(3, 4, IMAGE_SLOTS, edge=40)
    np.testing.assert_array_equal(load_policy(tmp_path / "q").infer(seen), alone.infer(seen))


def test_openpi_robots_are_known_by_their_assets(tmp_path: Path) -> None:
    policy = load_policy(write_openpi(tiny_pi05(), tmp_path / "p", "physical-intelligence/libero"))
    assert policy.cameras == ("image", "wrist_image")
    assert not policy.processor.config.discrete_state_input
    first, second = (observation(3, 4, policy.cameras) for _ in range(2))
    second.state[:] = 0
    np.testing.assert_array_equal(policy.infer(first), policy.infer(second))


def test_several_or_no_assets_are_named(tmp_path: Path) -> None:
    path = write_openpi(tiny_pi05(), tmp_path / "p")
    other = path / "assets" / "other" / "norm_stats.json"
    other.parent.mkdir()
    first = path / "assets/our/robot/norm_stats.json"
    other.write_text(first.read_text())
    with pytest.raises(CheckpointError, match=r"other, our/robot.*asset_id"):
        load_policy(path)
    load_policy(path, settings={"asset_id": "other"})
    other.unlink()
    first.unlink()
    with pytest.raises(CheckpointError, match="statistics are missing"):
        load_policy(path)


def test_lerobot_pi05_agrees_where_it_should(tmp_path: Path) -> None:
    """With 32 state channels and fitting images only the time grid is LeRobot's own."""
    policy = wide_pi05()
    theirs = load_policy(
        write_openpi(policy, tmp_path / "o"), settings={"cameras": SLOTS["cameras"]}
    )
    ours = load_policy(write_lerobot_pi05(policy, tmp_path / "l", (*CAMERAS, "empty_camera_0")))
    assert ours.cameras == CAMERAS
    seen = observation(5, 32, CAMERAS)
    grid = ours.module.time_grid(10)
    assert not torch.equal(grid, theirs.module.time_grid(10))
    noise, chunks = ours.draw_noise(1, 0), []
    for loaded in (ours, theirs):
        inputs = loaded.prepare([seen])
        actions = loaded.module.sample_actions(loaded.encode(inputs), noise, time_grid=grid)
        chunks.append(loaded.finish(actions, inputs))
    close(chunks[0], chunks[1])
    np.testing.assert_array_equal(ours.infer(seen, seed=0)[None], chunks[0])
    np.testing.assert_array_equal(
        grid.numpy(), np.array([1.0 - s * 0.1 for s in range(10)]).astype(np.float32)
    )


def test_lerobot_pi05_pads_the_state_before_it_is_discretised(tmp_path: Path) -> None:
    policy = wide_pi05(state_dim=4)
    loaded = load_policy(write_lerobot_pi05(policy, tmp_path / "l"))
    low = policy.processor.stats["state"].q01
    tokens, mask = loaded.processor.tokenize(["open"], np.asarray(low)[None])
    names = [loaded.processor.tokenizer.id_to_token(int(i)) for i in tokens[0, mask[0]]]
    state = names[names.index("state") + 2 : names.index(";")]
    assert state == ["0"] * 4 + ["128"] * 28
    again = load_policy(save_policy(loaded, tmp_path / "again", torch.float32))
    seen = observation(2, 4, loaded.cameras, edge=50)
    np.testing.assert_array_equal(again.infer(seen), loaded.infer(seen))


@pytest.mark.parametrize("norm", ["QUANTILES", "MEAN_STD", "MIN_MAX", "IDENTITY"])
def test_lerobot_normalizations(tmp_path: Path, norm: str) -> None:
    policy = wide_pi05(state_dim=4)
    processor = load_policy(write_lerobot_pi05(policy, tmp_path / "l", norm=norm)).processor
    stats, x = policy.processor.stats["actions"], np.linspace(-2, 2, 4)
    expected = {
        "QUANTILES": lambda: 2 * (x - stats.q01) / (stats.q99 - stats.q01) - 1,
        "MEAN_STD": lambda: (x - stats.mean) / (stats.std + 1e-8),
        "MIN_MAX": lambda: 2 * (x - stats.min) / (stats.max - stats.min) - 1,
        "IDENTITY": lambda: x,
    }[norm]()
    np.testing.assert_allclose(processor.normalize_actions(x)[:4], expected, atol=1e-5)
    padded = np.concatenate([expected, [9.0, 9.0]])
    np.testing.assert_allclose(processor.unnormalize_actions(padded), x, atol=1e-5)


def test_isaac_shards_give_the_same_actions(tmp_path: Path) -> None:
    policy = tiny_groot()
    path = write_isaac(policy, tmp_path / "g")
    settings = {"embodiment_id": 1, "resize": False}
    loaded = load_policy(path, settings=settings)
    close(loaded.infer(tiny_observation()), policy.infer(tiny_observation()))
    with pytest.raises(CheckpointError, match="32 embodiments do not fit"):
        load_policy(path)
    config = load_policy(path, settings={"embodiment_id": 1}).processor.config
    assert (config.crop, config.resize, config.cameras) == (0.95, True, CAMERAS)


def test_isaac_embodiments(tmp_path: Path) -> None:
    path = write_isaac(tiny_groot(), tmp_path / "g", "our_arm")
    with pytest.raises(CheckpointError, match=r"our_arm.*embodiment_id"):
        load_policy(path)
    file = path / "experiment_cfg/metadata.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "gr1": data["our_arm"]}))
    with pytest.raises(CheckpointError, match=r"our_arm, gr1.*embodiment_tag"):
        load_policy(path)
    load_policy(path, settings={"embodiment_tag": "our_arm", "embodiment_id": 0})
    file.write_text(json.dumps({"our_arm": {"modalities": data["our_arm"]["modalities"]}}))
    with pytest.raises(CheckpointError, match="lacks statistics of state"):
        load_policy(path, settings={"embodiment_id": 0})


def test_isaac_modes(tmp_path: Path) -> None:
    policy = tiny_groot()
    path, x = write_isaac(policy, tmp_path / "g"), np.array([-9.0, 0.1, 0.2, 0.3])
    stats = policy.processor.stats["state"]["state"]
    for mode in ("mean_std", "q99"):
        settings = {"embodiment_id": 1, "modes": {"state.state": mode}}
        norm = load_policy(path, settings=settings).processor.state_norm
        normed = 2 * (x - stats.q01) / (stats.q99 - stats.q01) - 1
        expected = normed.clip(-1, 1) if mode == "q99" else (x - stats.mean) / stats.std
        np.testing.assert_allclose(norm.normalize(x), expected, atol=1e-12)
    for modes, message in (
        ({"state.state": "zscore"}, "zscore"),
        ({"state.x": "q99"}, "no state.x"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_policy(path, settings={"embodiment_id": 1, "modes": modes})


def test_lerobot_groot_agrees(tmp_path: Path) -> None:
    policy = tiny_groot()
    path = write_lerobot_groot(policy, tmp_path / "l", tmp_path / "base")
    loaded = load_policy(path)
    assert loaded.cameras == tuple(sorted(CAMERAS))
    close(loaded.infer(tiny_observation()), policy.infer(tiny_observation()))
    ids = [loaded.processor.tokenize([p])[0] for p in ("", "Perform the task.")]
    assert torch.equal(*ids)
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(CheckpointError, match="base_model_path"):
        load_policy(path)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "openpi": lambda p: write_openpi(tiny_pi05(), p / "c"),
    "lerobot_pi05": lambda p: write_lerobot_pi05(wide_pi05(state_dim=4), p / "c"),
    "isaac": lambda p: write_isaac(tiny_groot(), p / "c"),
    "lerobot_groot": lambda p: write_lerobot_groot(tiny_groot(), p / "c", p / "base"),
}


@pytest.fixture(params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path)


def load(path: Path) -> None:
    sharded = next(path.glob("model-*"), None) is not None
    load_policy(path, settings={"embodiment_id": 1} if sharded else None)


def weights(path: Path) -> Path:
    return next(f for f in sorted(path.glob("model*.safetensors")))


def test_every_missing_file_is_named(written: Path) -> None:
    load(written)
    for file in [f for f in written.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=r"missing|no tokenizer"):
            load(written)
        file.write_bytes(content)


def test_truncated_weights_are_named(written: Path) -> None:
    file = weights(written)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{file.name} is not a readable"):
        load(written)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_quantized_weights_are_refused(written: Path, dtype: torch.dtype) -> None:
    file = weights(written)
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith("proj.weight"))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"is stored as (I8|F8_E4M3|I64)"):
        load(written)


def test_unknown_and_missing_tensors_are_listed(written: Path) -> None:
    file = weights(written)
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith("proj.weight"))
    tensors["stranger"] = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing .*proj\.weight; unknown stranger"):
        load(written)


def test_pi0_is_told_apart(tmp_path: Path) -> None:
    path = write_openpi(tiny_pi05(), tmp_path / "p")
    tensors = load_file(path / "model.safetensors")
    pi0 = {
        n.replace("time_mlp", "action_time_mlp"): t for n, t in tensors.items() if "dense" not in n
    }
    for prefix in ("", "model."):
        save_file({prefix + n: t for n, t in pi0.items()}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match="looks like pi0"):
            load_policy(path)


def test_groot_n17_is_told_apart(tmp_path: Path) -> None:
    path = write_isaac(tiny_groot(), tmp_path / "g")
    index = path / "model.safetensors.index.json"
    names = {"backbone.model.visual.x": 1, "action_head.model.transformer_blocks.0.x": 1}
    index.unlink()
    save_file({n: torch.zeros(1) for n in names}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"another release than N1\.5"):
        load_policy(path)
    lerobot = write_lerobot_groot(tiny_groot(), tmp_path / "l", tmp_path / "base")
    file = lerobot / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "base_model_path": "nvidia/GR00T-N1.7-3B"})
    )
    with pytest.raises(ConfigError, match=r"N1\.7"):
        load_policy(lerobot)


def test_lerobot_statistics_are_needed(tmp_path: Path) -> None:
    path = write_lerobot_pi05(wide_pi05(state_dim=4), tmp_path / "l")
    file = next(path.glob("policy_pre*_normalizer_processor.safetensors"))
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("observation.state")}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"no statistics of observation\.state"):
        load_policy(path)


def test_lerobot_leftovers_of_pi0_are_dropped(tmp_path: Path) -> None:
    policy = wide_pi05(state_dim=4)
    path = write_lerobot_pi05(policy, tmp_path / "l")
    file = path / "model.safetensors"
    expert = "model.paligemma_with_expert.gemma_expert.model"
    tensors = {n.replace("time_mlp_", "action_time_mlp_"): t for n, t in load_file(file).items()}
    extra = ("model.state_proj.weight", f"{expert}.norm.weight")
    extra = (*extra, f"{expert}.layers.0.input_layernorm.weight")
    save_file(tensors | {n: torch.zeros(2) for n in extra}, file)
    loaded = load_policy(path).module.state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in policy.module.state_dict().items())


def test_lerobot_images() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (30, 60, 3), dtype=np.uint8))
    fitted = lerobot_resize(image, 32, -3.0)
    assert (fitted[:, :8] == -3).all()
    assert (fitted[:, 24:] == -3).all()
    assert fitted[:, 8:24].abs().max() <= 1
    square = image[:, :30].repeat_interleave(2, 0).repeat_interleave(2, 1)[:32, :32].contiguous()
    torch.testing.assert_close(lerobot_resize(square, 32, -3.0), to_float(square))
    # Without antialiasing, halving averages pairs; with it, more pixels.
    halved = lerobot_resize(image[:30, :30].contiguous(), 15, -3.0)
    pairs = to_float(image[:30, :30]).unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    torch.testing.assert_close(halved, pairs, atol=1e-6, rtol=0)
    smooth = to_float(resize_with_pad(image[:30, :30].contiguous(), 15))
    assert (smooth - halved).abs().max() > 0.1
    grey = torch.full((20, 50, 3), 77, dtype=torch.uint8)
    assert (squash_bicubic(grey, 32) == 77).all()
    assert squash_bicubic(grey, 32).shape == (32, 32, 3)
