"""Demonstrations of LIBERO's expert: what is written is what training reads."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.envs.libero import LiberoEnv
from omega_qvla.envs.libero_files import find_assets, has_substitutes
from omega_qvla.envs.libero_protocol import libero_protocol
from omega_qvla.errors import EnvError
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy

CAMERAS = ("base", "wrist")
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
        "rendered": 256,
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


def test_demonstrations_are_rendered_as_the_published_protocols_render() -> None:
    from collect_libero import PROTOCOL

    ours, published = libero_protocol(PROTOCOL), libero_protocol("openpi")
    assert replace(ours, name=published.name) == published


def test_trained_on_are_the_pictures_that_the_exported_policy_sees(tmp_path: Path) -> None:
    from collect_libero import _write, shrunk
    from data import load_demonstrations
    from export import export
    from families import FAMILIES, make_family
    from train import Run, Settings

    rng = np.random.default_rng(0)
    views = {name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in CAMERAS}
    found = episode(0, steps=3)
    # Turned like the pictures of an evaluation: a view with negative strides.
    found |= {name: [shrunk(view[::-1, ::-1])] for name, view in views.items()}
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "libero_object-7-0000.npz", "libero_object/x", found)
    demos = load_demonstrations(data, FAMILIES["pi05"].horizon)
    assert demos.rendered == 256 and demos.shrunk
    Run(
        Settings("pi05", data, tmp_path / "run", minutes=1.0),
        make_family("pi05", demos, seed=0, compiled=False),
    ).save()
    export(tmp_path / "run", data, tmp_path / "out")

    policy = load_policy(tmp_path / "out")
    seen = Observation(
        {name: view[::-1, ::-1] for name, view in views.items()}, demos.state[0], PROMPT
    )
    inputs = policy.processor.prepare([seen])
    stored = (demos.images_base[0], demos.images_wrist[0])
    for image, picture in zip(inputs.images, stored, strict=False):
        assert image.shape == (1, 3, 80, 80)
        assert torch.equal(image[0], torch.from_numpy(picture).float().div_(127.5).sub_(1.0))


def test_pictures_of_different_renderings_are_not_mixed(tmp_path: Path) -> None:
    from collect_libero import _write
    from data import load_demonstrations

    for first, edge in enumerate((256, 80)):
        path = tmp_path / f"libero_object-7-{first:04d}.npz"
        _write(path, "libero_object/x", episode(first) | {"rendered": edge})
    with pytest.raises(ValueError, match=r"\[80, 256\] pixels"):
        load_demonstrations(tmp_path, horizon=4)


@pytest.mark.sim
@pytest.mark.libero
def test_a_run_goes_on_where_it_stopped(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    try:
        assets = find_assets(pytestconfig.getoption("--libero-assets"))
    except EnvError as error:
        pytest.skip(str(error))
    from collect_libero import main, shrunk

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
        task, seed, stored = str(file["task"]), int(file["seed"]), file["images_base"][0]
    # What an evaluation shows at this start, shrunk: bit for bit what was stored.
    env = LiberoEnv(task, "openpi", assets, has_substitutes(assets))
    env.sample_state(seed)
    seen = env.observe().images["base"]
    assert seen.shape == (256, 256, 3) and np.array_equal(shrunk(seen), stored)
    env.close()
