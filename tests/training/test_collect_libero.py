"""Demonstrations of LIBERO's expert: what is written is what training reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.envs.libero_files import find_assets, has_substitutes
from omega_qvla.envs.libero_protocol import libero_protocol
from omega_qvla.errors import EnvError

PROMPT = "pick up the milk and place it in the basket"


def episode(first: int, steps: int = 10) -> dict[str, Any]:
    rng = np.random.default_rng(first)
    rendered = list(range(0, steps, 3))
    images = [rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for _ in rendered]
    return {
        "base": images,
        "wrist": images[::-1],
        "state": list(rng.normal(size=(len(rendered), 8))),
        "raw": list(rng.normal(size=(len(rendered), 7))),
        "step": rendered,
        "labels": [np.full(7, 0.1 * (step + first)) for step in range(steps)],
        "executed": [np.zeros(7)] * steps,
        "first": first,
        "seed": 10 * first,
        "attempts": 1,
        "prompt": PROMPT,
    }


def test_episodes_are_read_as_training_wants_them(tmp_path: Path) -> None:
    from collect_libero import _write
    from data import load_demonstrations

    for first in range(4):
        _write(tmp_path / f"libero_object-7-{first:04d}.npz", "libero_object/x", episode(first))
    demos = load_demonstrations(tmp_path, horizon=4, held_out_every=4)
    assert demos.state.shape == (16, 8) and demos.chunks.shape == (16, 4, 7)
    # Episode 2, rendered step 9 of 10: the last label, repeated.
    np.testing.assert_allclose(demos.chunks[11, :, 0], [1.1] * 4, rtol=1e-6)
    assert demos.held_out.tolist() == [False] * 12 + [True] * 4
    assert demos.prompts == (PROMPT,)
    assert np.array_equal(demos.images_base[0].transpose(1, 2, 0), episode(0)["base"][0])


def test_noise_moves_the_hand_and_never_the_fingers() -> None:
    from collect_libero import disturbance

    rng = np.random.default_rng(0)
    for kind in range(3):
        noise = disturbance(rng, kind, 400)
        assert noise.shape == (400, 7) and not noise[:, 6].any()
        assert bool(noise.any()) == (kind > 0)
    repeated = (np.diff(noise[:, 0]) == 0).mean()
    assert repeated > 0.5  # held for several steps


def test_the_small_policies_protocol_is_one() -> None:
    from collect_libero import PROTOCOL
    from configs import IMAGE_SIZE

    protocol = libero_protocol(PROTOCOL)
    assert protocol.camera_size == IMAGE_SIZE and protocol.execute == 5


@pytest.mark.sim
@pytest.mark.libero
def test_a_run_goes_on_where_it_stopped(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    try:
        assets = find_assets(pytestconfig.getoption("--libero-assets"))
    except EnvError as error:
        pytest.skip(str(error))
    from collect_libero import main

    words = ["--out", str(tmp_path), "--tasks", "1", "--every", "20", "--workers", "1"]
    words += ["--assets", str(assets)] + ["--substitutes"] * has_substitutes(assets)
    main([*words, "--episodes", "1"])
    first = tmp_path / "libero_object-1-0000.npz"
    before = first.stat().st_mtime_ns
    main([*words, "--episodes", "2"])
    assert first.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "libero_object-1-0000.npz",
        "libero_object-1-0001.npz",
        "manifest.json",
    ]
    with np.load(first) as file:
        assert file["images_base"].shape[1:] == (80, 80, 3) and file["images_base"].std() > 10
        assert file["actions"].shape[1] == 7 and np.abs(file["actions"]).max() <= 1
        assert np.array_equal(file["actions"], file["executed"])  # the first of three has no noise
