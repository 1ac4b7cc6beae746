from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.errors import CheckpointError, ObservationError
from omega_qvla.policies.images import crop_and_resize, resize_with_pad, stack_images, to_float
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.statistics import (
    MinMaxNorm,
    QuantileNorm,
    Stats,
    compute_statistics,
    pad_last,
)
from policies.tiny import CAMERAS, tiny_groot, tiny_observation, tiny_pi05


def test_statistics_of_known_values() -> None:
    values = np.stack([np.arange(101.0), np.full(101, 3.0)], axis=1)
    stats = compute_statistics(values.reshape(101, 1, 2))
    np.testing.assert_allclose(stats.mean, [50, 3])  # type: ignore[arg-type]
    np.testing.assert_allclose(stats.std, [np.sqrt((101**2 - 1) / 12), 0])  # type: ignore[arg-type]
    np.testing.assert_allclose(stats.q01, [1, 3])  # type: ignore[arg-type]
    np.testing.assert_allclose(stats.q99, [99, 3])  # type: ignore[arg-type]
    again = Stats.from_dict(stats.to_dict(), "here")
    assert all(np.array_equal(getattr(again, f), getattr(stats, f)) for f in stats.to_dict())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"min": [0.0], "max": [1.0, 2.0]}, "one length"),
        ({"min": [float("nan")]}, "finite"),
    ],
)
def test_bad_statistics_are_refused(data: dict[str, list[float]], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"here.*{message}"):
        Stats.from_dict(data, "here")


def test_missing_statistics_are_named() -> None:
    with pytest.raises(CheckpointError, match="actions: statistics lack q01, q99"):
        QuantileNorm(Stats(min=np.zeros(1), max=np.ones(1)), "actions")


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_normalizations_invert(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(64, width)) * 10.0 ** rng.integers(-2, 3, width)
    stats = compute_statistics(values)
    for norm in (QuantileNorm(stats, "x"), MinMaxNorm(stats, "x")):
        normed = norm.normalize(values)
        np.testing.assert_allclose(norm.unnormalize(normed), values, rtol=1e-9, atol=1e-9)
    assert np.abs(MinMaxNorm(stats, "x").normalize(values)).max() <= 1 + 1e-12


def test_quantile_norm_is_openpi_formula_and_does_not_clip() -> None:
    norm = QuantileNorm(Stats(q01=np.array([2.0]), q99=np.array([4.0])), "x")
    expected = (np.array([2.0, 4.0, 10.0]) - 2) / (2 + 1e-6) * 2 - 1
    np.testing.assert_allclose(norm.normalize(np.array([[2.0], [4.0], [10.0]]))[:, 0], expected)


def test_min_max_norm_of_a_constant_channel_is_zero() -> None:
    norm = MinMaxNorm(Stats(min=np.array([3.0, 0.0]), max=np.array([3.0, 2.0])), "x")
    assert norm.normalize(np.array([3.0, 2.0])).tolist() == [0.0, 1.0]
    assert norm.unnormalize(np.array([0.0, 1.0])).tolist() == [3.0, 2.0]


def test_actions_are_padded_and_cut() -> None:
    for processor, width in ((tiny_pi05().processor, 6), (tiny_groot().processor, 6)):
        raw = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4))
        normed = processor.normalize_actions(raw)
        assert normed.shape == (2, 5, width)
        assert normed.dtype == np.float32
        assert not normed[..., 4:].any()
        np.testing.assert_allclose(processor.unnormalize_actions(normed), raw, atol=1e-6)
    assert pad_last(np.ones((2, 3)), 5).sum() == 6


def test_groot_state_is_min_max_normalized_and_padded() -> None:
    processor = tiny_groot().processor
    low = processor.state_norm.low
    state = processor.normalize_state(low[None])
    np.testing.assert_allclose(state[0], [-1] * 4 + [0] * 4, atol=1e-6)


def test_pixels_are_scaled_to_plus_minus_one() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 1] = (255, 51, 0)
    scaled = to_float(torch.from_numpy(image)[None])
    assert scaled.shape == (1, 3, 2, 2)
    torch.testing.assert_close(scaled[0, :, 0, 1], torch.tensor([1.0, 51 / 255 * 2 - 1, -1.0]))


def test_inputs_carry_the_cameras_in_model_order() -> None:
    observation = tiny_observation()
    pi05 = tiny_pi05()
    inputs = pi05.prepare([observation, observation])
    assert [bool(mask.all()) for mask in inputs.image_masks] == [True, True, False]
    groot = tiny_groot().prepare([observation, observation])
    for position, camera in enumerate(CAMERAS):
        expected = to_float(torch.from_numpy(observation.images[camera]))
        torch.testing.assert_close(inputs.images[position][1], expected)
        torch.testing.assert_close(groot.pixel_values[2 + position], expected)
    assert (inputs.images[2] == -1).all()


def test_resize_with_pad_agrees_with_pillow() -> None:
    pil = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(pil.fromarray(smooth).resize((160, 120), pil.Resampling.BICUBIC))
    ours = resize_with_pad(torch.from_numpy(image.copy()), 56).numpy()
    resized = np.asarray(pil.fromarray(image).resize((56, 42), pil.Resampling.BILINEAR))
    expected = np.zeros((56, 56, 3), np.uint8)
    expected[7:49] = resized
    assert np.abs(ours.astype(int) - expected).max() <= 1
    same = torch.from_numpy(image[:56, :56].copy())
    assert torch.equal(resize_with_pad(same, 56), same)


def test_crop_keeps_the_centre() -> None:
    image = torch.zeros((256, 256, 3), dtype=torch.uint8)
    image[6:249, 6:249] = 200  # int(256 * 0.95) = 243 pixels, torchvision's offset
    cropped = crop_and_resize(image, 224, 0.95)
    assert cropped.shape == (224, 224, 3)
    assert cropped.min() >= 199
    assert crop_and_resize(image, 224, None).min() == 0


def test_resizing_processors_take_any_size() -> None:
    big = tiny_observation()
    images = {c: np.full((48, 64, 3), 90, np.uint8) for c in CAMERAS}
    big = replace(big, images=images)
    pi05, groot = tiny_pi05(), tiny_groot()
    for policy in (pi05, groot):
        with pytest.raises(ObservationError):
            policy.infer(big)
    pi05.processor.config = replace(pi05.processor.config, resize=True)
    groot.processor.config = replace(groot.processor.config, resize=True, crop=0.95)
    for policy in (pi05, groot):
        assert np.isfinite(policy.infer(big)).all()
    with pytest.raises(ObservationError, match="height, width, 3"):
        stack_images([Observation({"base": np.zeros((3, 4))}, big.state, "")], "base", None)


def test_processors_refuse_parts_that_do_not_fit() -> None:
    processor = tiny_pi05().processor
    parts = (processor.model, processor.tokenizer, processor.stats)
    with pytest.raises(CheckpointError, match="channels"):
        Pi05Processor(replace(processor.config, state_dim=3), *parts)
    with pytest.raises(CheckpointError, match="slots"):
        Pi05Processor(replace(processor.config, cameras={"front": "base"}), *parts)
    small = replace(processor.model, vocab_size=10)
    with pytest.raises(CheckpointError, match="tokens"):
        Pi05Processor(processor.config, small, *parts[1:])
    groot = tiny_groot().processor
    rest = (groot.model, groot.tokenizer, groot.stats)
    for change in ({"embodiment_id": 2}, {"state_keys": ("arm",)}, {"action_keys": ()}):
        with pytest.raises(CheckpointError):
            type(groot)(replace(groot.config, **change), *rest)  # type: ignore[arg-type]
    other = replace(groot.model, eagle=replace(groot.model.eagle, image_token_index=1))
    with pytest.raises(CheckpointError, match="image_token_index"):
        type(groot)(groot.config, other, *rest[1:])
