from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.calibration import (
    ObservationSet,
    SampleMeta,
    part,
    pick,
    read_observations,
    select_samples,
    split,
    write_observations,
)
from omega_qvla.errors import CalibrationError
from omega_qvla.pack.files import read_header, write_tensors
from omega_qvla.pack.reader import load_tensors
from omega_qvla.policies.observation import Observation


def make_set(episodes: dict[str, list[int]], seed: int = 0) -> ObservationSet:
    """`episodes`: task -> lengths of its episodes."""
    rng = np.random.default_rng(seed)
    observations, meta = [], []
    for task, lengths in episodes.items():
        for episode, length in enumerate(lengths):
            for step in range(length):
                images = {
                    name: rng.integers(0, 256, (4, 6, 3), dtype=np.uint8) for name in ("a", "b")
                }
                state = rng.normal(size=3).astype(np.float32)
                observations.append(Observation(images, state, f"do {task}"))
                meta.append(SampleMeta(episode, step, task))
    return ObservationSet(tuple(observations), tuple(meta), "made up")


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    samples = make_set({"push": [3, 2], "pull": [1]})
    write_observations(tmp_path / "s", samples.observations, samples.meta, samples.source)
    read = read_observations(tmp_path / "s")
    assert read.meta == samples.meta
    assert read.source == "made up"
    for one, other in zip(read, samples, strict=True):
        assert one.prompt == other.prompt
        np.testing.assert_array_equal(one.state, other.state)
        assert set(one.images) == {"a", "b"}
        for name in one.images:
            np.testing.assert_array_equal(one.images[name], other.images[name])
            assert one.images[name].dtype == np.uint8
    assert read.digest() == samples.digest()


def test_digest_sees_pixels_states_prompts_and_origins() -> None:
    samples = make_set({"push": [3]})
    first = samples.observations[0]
    images = {**first.images, "a": first.images["a"] ^ 1}
    changed = [
        Observation(images, first.state, first.prompt),
        Observation(first.images, first.state + 1e-6, first.prompt),
        Observation(first.images, first.state, "other"),
    ]
    digests = {samples.digest(), samples.take([0, 1]).digest(), samples.take([1, 0, 2]).digest()}
    for observation in changed:
        rest = samples.observations[1:]
        digests.add(ObservationSet((observation, *rest), samples.meta, "made up").digest())
    assert len(digests) == 6


def test_unusable_sets(tmp_path: Path) -> None:
    samples = make_set({"push": [2]})
    one, two = samples.observations
    with pytest.raises(CalibrationError, match="at least one"):
        write_observations(tmp_path / "s", [], [])
    with pytest.raises(CalibrationError, match="origin"):
        write_observations(tmp_path / "s", [one, two], samples.meta[:1])
    for other in (
        Observation({"a": two.images["a"]}, two.state, ""),
        Observation({**two.images, "c": two.images["a"]}, two.state, ""),
        Observation({**two.images, "a": two.images["a"][:2]}, two.state, ""),
        Observation(two.images, two.state[:2], ""),
    ):
        with pytest.raises(CalibrationError, match="one set must"):
            write_observations(tmp_path / "s", [one, other], samples.meta)
    assert not list(tmp_path.iterdir())


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "s"
    samples = make_set({"push": [2]})
    write_observations(path, samples.observations, samples.meta)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CalibrationError, match="truncated"):
        read_observations(path)
    with pytest.raises(CalibrationError, match="No such file"):
        read_observations(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("source"),
        lambda plain: plain.update(prompts=[], origins=[]),  # would be no observations at all
        lambda plain: plain.update(prompts=plain["prompts"][:1], origins=plain["origins"][:1]),
        lambda plain: plain["prompts"].pop(),
    ],
)
def test_words_that_do_not_fit_the_pictures(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "s"
    samples = make_set({"push": [2]})
    write_observations(path, samples.observations, samples.meta)
    header = read_header(path, CalibrationError)
    plain = json.loads(header.metadata["samples"])
    change(plain)
    tensors = load_tensors(path, header.entries)
    write_tensors(path, tensors, {**header.metadata, "samples": json.dumps(plain)})
    with pytest.raises(CalibrationError, match="damaged file of observations"):
        read_observations(path)


def test_selection_is_balanced_over_tasks_and_episodes() -> None:
    samples = make_set({"push": [50, 40, 60], "pull": [9] * 10, "open": [30]})
    chosen = select_samples(samples, 30, seed=1)
    assert Counter(meta.task for meta in chosen.meta) == {"push": 10, "pull": 10, "open": 10}
    per_push = Counter(meta.episode for meta in chosen.meta if meta.task == "push")
    assert sorted(per_push.values()) == [3, 3, 4]
    per_pull = Counter(meta.episode for meta in chosen.meta if meta.task == "pull")
    assert set(per_pull.values()) == {1}
    steps = sorted(meta.step for meta in chosen.meta if meta.task == "open")
    assert len(set(steps)) == 10
    assert max(np.diff([-1, *steps, 30])) <= 8  # ten of thirty, spread: no gap above 8


def test_selection_is_seeded_ordered_and_without_repeats() -> None:
    samples = make_set({"push": [20, 20], "pull": [20]})
    one, again = select_samples(samples, 10, seed=3), select_samples(samples, 10, seed=3)
    assert one.meta == again.meta
    assert one.meta != select_samples(samples, 10, seed=4).meta
    keys = [(meta.task, meta.episode, meta.step) for meta in one.meta]
    assert keys == sorted(set(keys))
    assert len(select_samples(samples, 60).meta) == 60
    for n in (0, 61):
        with pytest.raises(CalibrationError, match=f"choose {n} "):
            select_samples(samples, n)


def test_default_is_the_published_ten() -> None:
    assert len(select_samples(make_set({"push": [20]}))) == 10


def test_split_shares_no_episode() -> None:
    samples = make_set({"push": [5, 6, 7, 8], "pull": [3, 3]})
    kept, held = split(samples, 0.5, seed=2)

    def keys(part: ObservationSet) -> set[tuple[str, int]]:
        return {(meta.task, meta.episode) for meta in part.meta}

    assert not keys(kept) & keys(held)
    assert len(kept) + len(held) == len(samples)
    assert Counter(task for task, _ in keys(held)) == {"push": 2, "pull": 1}
    assert Counter(task for task, _ in keys(kept)) == {"push": 2, "pull": 1}
    assert Counter(t for t, _ in keys(split(samples, 0.9)[0])) == {"push": 1, "pull": 1}
    with pytest.raises(CalibrationError, match="'alone' has one episode"):
        split(make_set({"alone": [9]}))
    with pytest.raises(CalibrationError, match="fraction"):
        split(samples, 1.0)


def test_larger_sets_contain_smaller_ones_and_the_seed_chooses_among_tasks() -> None:
    samples = make_set({f"task {i:02}": [6, 5] for i in range(12)})
    sets = [set(pick(samples.meta, n, seed=4)) for n in (3, 10, 50, 132)]
    assert all(small < large for small, large in pairwise(sets))
    first = {samples.meta[i].task for seed in range(8) for i in pick(samples.meta, 2, seed)}
    assert len(first) > 6  # not always the first two in the alphabet


def test_picking_among_some() -> None:
    samples = make_set({"push": [20, 20], "pull": [20]})
    kept, held = part(samples.meta, 0.5)
    assert set(pick(samples.meta, 9, 1, held)) < set(held)
    assert set(pick(samples.meta, 9, 1, kept)) < set(kept)
    with pytest.raises(CalibrationError, match=f"choose {len(held) + 1} "):
        pick(samples.meta, len(held) + 1, 1, held)


def test_tasks_of_one_episode_are_split_together() -> None:
    samples = make_set({f"task {i}": [3] for i in range(5)})
    kept, held = split(samples, 0.2)
    assert (len({m.task for m in kept.meta}), len({m.task for m in held.meta})) == (4, 1)
    kept, held = split(make_set({"alone": [9], "push": [3, 3]}), 0.5)
    assert {m.task for m in held.meta} == {"push"}
    assert {m.task for m in kept.meta} == {"alone", "push"}
