from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.helpers import all_targets, tiny_samples
from omega_qvla.calibration import Calibration, calibrate
from omega_qvla.calibration.collect import DEFAULT_TOKEN_CAP
from omega_qvla.errors import CalibrationError
from omega_qvla.pack.files import read_header, write_tensors
from omega_qvla.pack.manifest import sha256_text
from omega_qvla.pack.reader import load_tensors
from policies.tiny import TINY


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    policy = TINY["pi05"]()
    return calibrate(policy, tiny_samples(), all_targets(policy), seed=5)


def test_provenance_says_where_it_comes_from(calibration: Calibration) -> None:
    origin = dict(calibration.provenance)
    assert len(origin.pop("observations_sha256")) == len(origin.pop("checkpoint_sha256")) == 64
    assert origin == {
        "source": "tiny",
        "count": 3,
        "seed": 5,
        "token_cap": DEFAULT_TOKEN_CAP,
        "num_steps": 10,
        "dtype": "float32",
        "samples": [["t", 0, 4], ["t", 1, 4], ["t", 2, 4]],
    }


def test_same_samples_same_calibration(calibration: Calibration) -> None:
    policy = TINY["pi05"]()
    names = all_targets(policy)
    assert calibrate(policy, tiny_samples(), names, seed=5).digest() == calibration.digest()
    assert calibrate(policy, tiny_samples(), names, seed=6).digest() != calibration.digest()
    assert calibrate(policy, tiny_samples(2), names, seed=5).digest() != calibration.digest()


def test_saved_and_loaded_is_the_same(calibration: Calibration, tmp_path: Path) -> None:
    loaded = Calibration.load(calibration.save(tmp_path / "c"))
    assert loaded.digest() == calibration.digest()
    assert loaded.provenance == calibration.provenance
    assert set(loaded.stats) == set(calibration.stats)
    for name, stats in calibration.stats.items():
        other = loaded.stats[name]
        assert other.count == stats.count
        assert torch.equal(other.hessian, stats.hessian)
        assert torch.equal(other.profile, stats.profile)
        assert len(other.tokens) == len(stats.tokens)
        assert all(torch.equal(a, b) for a, b in zip(other.tokens, stats.tokens, strict=True))
    calibration.save(tmp_path / "again")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "again").read_bytes()


def test_shared_inputs_are_stored_once(calibration: Calibration, tmp_path: Path) -> None:
    hessians = [
        name
        for name in read_header(calibration.save(tmp_path / "c")).entries
        if name.endswith(".hessian")
    ]
    # Per expert layer q/k/v, o, gate/up, down; of the last language layer only k/v run.
    assert len(hessians) == 2 * 4 + 4 + 1
    assert len(calibration.stats) == 2 * 7 + 7 + 2
    loaded = Calibration.load(tmp_path / "c")
    assert len({id(stats) for stats in loaded.stats.values()}) == len(hessians)


def test_damage_is_noticed(calibration: Calibration, tmp_path: Path) -> None:
    path = calibration.save(tmp_path / "c")
    raw, header = path.read_bytes(), read_header(path)
    rng = np.random.default_rng(0)
    name, entry = next(iter(header.entries.items()))
    for position in (*rng.choice(header.data_start, 200), header.data_start + entry.begin):
        changed = bytearray(raw)
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with pytest.raises(CalibrationError):
            Calibration.load(path)
    with pytest.raises(CalibrationError, match=f"altered tensors: {name}"):
        Calibration.load(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(CalibrationError, match="truncated"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        Calibration.load(tmp_path / "missing")


@pytest.mark.parametrize("family", TINY)
def test_steps_are_where_the_policy_says(family: str) -> None:
    policy = TINY[family]()
    stats = calibrate(policy, tiny_samples(1), all_targets(policy)).stats
    outside = set(policy.step_independent_linears())
    for name, found in stats.items():
        inside = policy.side_of(name) == "action_head" and name not in outside
        assert len(found.tokens) == (policy.num_steps if inside else 1), name


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"tensors": {}, "groups": {"x": 1}}'])
def test_an_index_that_its_hash_fits_but_nothing_else(
    calibration: Calibration, tmp_path: Path, text: str
) -> None:
    path = calibration.save(tmp_path / "c")
    header = read_header(path, CalibrationError)
    tensors = load_tensors(path, header.entries)
    fitted = {**header.metadata, "index": text, "index_sha256": sha256_text(text)}
    write_tensors(path, tensors, fitted)
    with pytest.raises(CalibrationError, match=r"damaged index|altered tensors"):
        Calibration.load(path)
