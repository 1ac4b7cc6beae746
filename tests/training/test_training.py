from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TASKS = {"drawer-open": "open the drawer", "window-close": "slide the window closed"}


def write_shard(folder: Path, task: str, prompt: str, episodes: int = 2, steps: int = 12) -> None:
    rng = np.random.default_rng(len(task))
    rendered = np.arange(0, steps, 3)
    n = episodes * len(rendered)
    images = rng.integers(0, 256, (n, 80, 80, 3), dtype=np.uint8)
    actions = np.arange(episodes * steps, dtype=np.float32)[:, None] * [0.01, -0.01, 0.02, 0.0]
    np.savez(
        folder / f"{task}-000.npz",
        images_base=images,
        images_wrist=images[::-1],
        state=rng.normal(size=(n, 4)).astype(np.float32),
        raw=rng.normal(size=(n, 39)).astype(np.float32),
        step=np.tile(rendered, episodes).astype(np.int32),
        episode=np.repeat(np.arange(episodes, dtype=np.int32), len(rendered)),
        actions=actions.astype(np.float32),
        offsets=np.arange(episodes + 1, dtype=np.int64) * steps,
        prompt=np.array(prompt),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for task, prompt in TASKS.items():
        write_shard(data, task, prompt)
    return data


def test_chunks_are_the_labels_that_follow_and_stop_at_the_episode(folder: Path) -> None:
    from data import load_demonstrations

    demos = load_demonstrations(folder, horizon=5, held_out_every=2)
    assert demos.chunks.shape == (16, 5, 4)
    # Task 0, episode 1, its last rendered step is 9 of 12: rows 21, 22, 23, then 23 repeated.
    np.testing.assert_allclose(demos.chunks[7, :, 2], [0.42, 0.44, 0.46, 0.46, 0.46], rtol=1e-6)
    # Episode 0 never reads into episode 1, which begins at row 12.
    assert demos.chunks[:4, :, 2].max() == pytest.approx(0.22)
    assert demos.held_out.tolist() == ([False] * 4 + [True] * 4) * 2
    assert demos.prompts == tuple(TASKS.values())


def test_no_shards_is_named(tmp_path: Path) -> None:
    from data import load_demonstrations

    with pytest.raises(FileNotFoundError, match="collect"):
        load_demonstrations(tmp_path, 5)


def test_augmentation_shifts_and_lights_each_image_by_itself() -> None:
    from data import augment

    images = torch.zeros(64, 3, 20, 20)
    images[:, :, 10, 10] = 1.0
    shifted = augment(images, torch.Generator().manual_seed(0), shift=4, light=0.0)
    places = {tuple(image[0].nonzero()[0].tolist()) for image in shifted}
    assert all(image.sum() == 3 for image in shifted)
    assert len(places) > 20
    assert all(6 <= row <= 14 and 6 <= column <= 14 for row, column in places)
    lit = augment(images + 0.5, torch.Generator().manual_seed(0), shift=0)
    assert lit.min() >= 0 and lit.max() <= 1
    assert len({round(float(image[0, 0, 0]), 4) for image in lit}) > 50


def test_learning_rate_warms_up_and_falls() -> None:
    from train import learning_rate

    rates = [learning_rate(p / 100, 1.0) for p in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[2] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["pi05", "groot_n15"])
def test_loss_falls_and_a_resumed_run_is_the_undisturbed_one(
    name: str, folder: Path, tmp_path: Path
) -> None:
    from data import load_demonstrations
    from families import FAMILIES, make_batch, make_family
    from train import Run, Settings

    demos = load_demonstrations(folder, FAMILIES[name].horizon)
    rows = torch.arange(4)

    def start(out: str) -> Any:
        settings = Settings(name, folder, tmp_path / out, minutes=1.0)
        return Run(settings, make_family(name, demos, seed=0, compiled=False))

    def step(run: Any) -> float:
        run.elapsed += 3.0
        loss: float = run.train_step(make_batch(demos, rows, run.family, run.generator))[0]
        return loss

    whole = start("a")
    losses = [step(whole) for _ in range(6)]
    assert losses[-1] < losses[0]
    first = start("b")
    for _ in range(3):
        step(first)
    first.save()
    again = start("b")
    assert again.step == 3
    assert [step(again) for _ in range(3)] == pytest.approx(losses[3:], rel=1e-4)
    last = dict(again.family.trainable.named_parameters())
    for key, value in whole.family.trainable.named_parameters():
        torch.testing.assert_close(last[key], value, rtol=1e-3, atol=1e-4)
    again.log(flow=1.0)
    assert json.loads((tmp_path / "b" / "log.jsonl").read_text())["step"] == 6


def test_held_out_loss_is_logged_where_episodes_are_held_out(folder: Path, tmp_path: Path) -> None:
    from train import Settings, train

    for every, there in ((2, True), (25, False)):
        out = tmp_path / str(every)
        # Half a second: a step or two, and the log's last line.
        settings = Settings("pi05", folder, out, 0.5 / 60, batch=4, samples=1)
        train(replace(settings, shift=0, held_out_every=every))
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        assert ("held_out" in last) == there and last["flow"] > 0
