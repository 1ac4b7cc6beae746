"""Builds that are killed, run twice at once, or meet a full disk: named, and gone on with."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibration.helpers import all_targets, tiny_samples
from disks import disk_with, file_limit, small_disk
from killing import Commands, commands
from omega_qvla.bundle import write_bundle
from omega_qvla.calibration import Calibration, SampleMeta, calibrate
from omega_qvla.calibration.samples import write_observations
from omega_qvla.config import preset
from omega_qvla.errors import BundleError, CalibrationError, PackError
from omega_qvla.pack import read_pack
from omega_qvla.pack.lock import output_lock
from omega_qvla.policies.base import Policy
from omega_qvla.policies.registry import load_policy, save_policy
from omega_qvla.quantize import quantize_policy
from policies.tiny import tiny_groot, tiny_pi05

ROOT = Path(__file__).resolve().parents[1]
FULL = r"No space left on device; make room there and call again"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint and observations."""
    folder = tmp_path_factory.mktemp("interrupted")
    save_policy(tiny_pi05(num_steps=4), folder / "checkpoint")
    samples = tiny_samples(3)
    write_observations(folder / "o.safetensors", samples.observations, samples.meta, "a test")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Commands]:
    with commands() as found:
        yield found


def kill_until_done(
    server: Commands, words: list[object], out: Path, seconds: float, kills: int, seed: int
) -> None:
    """Kill the command at random moments, `kills` times and at least once between two layers;
    then let it finish."""
    rng, hits, between = random.Random(seed), 0, False
    for _ in range(10 * kills):
        code, spent = server.run(words, kill_after=rng.uniform(0, seconds))
        assert code in (0, -9)
        hits += code == -9
        between = between or (code == -9 and any(out.parent.glob(f"{out.name}.partial/layer-*")))
        if out.exists():
            read_pack(out)  # whole, whenever it is there
        if code == 0:
            seconds = spent
        if hits >= kills and between:
            break
    assert hits >= kills and between, f"only {hits} of the kills came in time"
    assert server.run(words)[0] == 0


@pytest.mark.parametrize("recipe", ["omega", "rtn"])
def test_sigkill_at_random_moments_and_the_same_bytes(
    place: Path, server: Commands, recipe: str, tmp_path: Path
) -> None:
    """Nothing in a pack depends on when, how often or by which process it was built."""
    words = ["quantize", place / "checkpoint", "--recipe", recipe, "--quiet"]
    if recipe != "rtn":
        words += ["--observations", place / "o.safetensors", "--num-samples", 3]
    code, seconds = server.run([*words, "--out", tmp_path / "whole"])
    assert code == 0
    out = tmp_path / "p"
    kill_until_done(server, [*words, "--out", out], out, seconds, kills=5, seed=len(recipe))
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p", "whole"]


def test_sigkill_while_bundling_leaves_no_half_bundle(
    place: Path, server: Commands, tmp_path: Path
) -> None:
    pack, out, rng = tmp_path / "p", tmp_path / "bundle", random.Random(4)
    policy = load_policy(place / "checkpoint")
    quantize_policy(policy, preset("rtn"), None, out=pack)
    words = ["bundle", place / "checkpoint", pack, "--quiet", "--out"]
    code, seconds = server.run([*words, tmp_path / "whole"])
    assert code == 0
    for _ in range(6):
        code, _ = server.run([*words, out], kill_after=rng.uniform(0, seconds))
        assert out.exists() == (code == 0)  # there only when it is finished
        if code == 0:
            break
    if not out.exists():
        assert server.run([*words, out])[0] == 0
    for file in (f for f in out.rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "whole" / file.relative_to(out)).read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bundle", "p", "whole"]


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("name", ["pi05-metaworld", "groot-n15-metaworld"])
def test_sigkill_on_a_trained_policy(name: str, server: Commands, tmp_path: Path) -> None:
    words = ["quantize", ROOT / "assets" / name, "--observations", tmp_path / "o", "--quiet"]
    from omega_qvla.cli.sources import expert_episode

    found = expert_episode("drawer-open", 200_000)[:3]
    meta = [SampleMeta(200_000, step, "drawer-open") for step, _ in found]
    write_observations(tmp_path / "o", [o for _, o in found], meta, "expert")
    words += ["--num-samples", 3]
    code, seconds = server.run([*words, "--out", tmp_path / "whole"])
    assert code == 0
    out = tmp_path / "p"
    kill_until_done(server, [*words, "--out", out], out, seconds, kills=8, seed=1)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_builds_on_one_output(place: Path, server: Commands, tmp_path: Path) -> None:
    out = tmp_path / "p"
    words = ["quantize", place / "checkpoint", "--recipe", "rtn", "--quiet", "--out", out]
    with output_lock(out):
        assert server.run(words)[0] == 2  # another process
        with pytest.raises(PackError, match=r"another build \(pid \d+\) is writing it"):
            quantize_policy(load_policy(place / "checkpoint"), preset("rtn"), None, out=out)
    assert server.run(words)[0] == 0
    bundle = tmp_path / "b"
    with output_lock(bundle), pytest.raises(BundleError, match="another build"):
        write_bundle(place / "checkpoint", out, bundle)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p"]


def whole_and_finished(partial: Path) -> int:
    """Every file that an unfinished build left is whole; how many layers there are."""
    assert not list(partial.glob(".*"))
    layers = list(partial.glob("layer-*"))
    for file in layers:
        read_pack(file)
    return len(layers)


@pytest.mark.parametrize("family", [tiny_pi05, tiny_groot])
def test_a_disk_that_fills_up_during_a_build(family: Any, tmp_path: Path) -> None:
    policy: Policy = family()
    recipe, samples = preset("omega"), tiny_samples(2)
    whole = quantize_policy(policy, recipe, samples, out=tmp_path / "whole").read_bytes()
    out, rng, before = tmp_path / "p", random.Random(3), 0
    for share in sorted(rng.uniform(0, 1.2) for _ in range(5)):
        with (
            disk_with(int(share * len(whole))),
            pytest.raises(PackError, match=FULL) as caught,
        ):
            quantize_policy(policy, recipe, samples, out=out)
        assert str(tmp_path) in str(caught.value)
        assert not out.exists()
        reached = whole_and_finished(tmp_path / "p.partial")
        assert reached >= before
        before = reached
    assert before > 5
    quantize_policy(policy, recipe, samples, out=out)
    assert out.read_bytes() == whole
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p", "whole"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The layers fit under the kernel's limit, the pack does not."""
    policy = tiny_pi05()
    whole = quantize_policy(policy, preset("rtn"), None, out=tmp_path / "whole").read_bytes()
    with file_limit(len(whole) // 2), pytest.raises(PackError, match="File too large; make room"):
        quantize_policy(policy, preset("rtn"), None, out=tmp_path / "p")
    assert whole_and_finished(tmp_path / "p.partial") == len(all_targets(policy))
    quantize_policy(policy, preset("rtn"), None, out=tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == whole


def test_a_small_disk_in_earnest(place: Path, tmp_path: Path) -> None:
    policy = load_policy(place / "checkpoint")
    whole = quantize_policy(policy, preset("rtn"), None, out=tmp_path / "whole")
    write_bundle(place / "checkpoint", whole, tmp_path / "bundle")
    size = whole.stat().st_size
    with small_disk(tmp_path / "disk", size // 4096 * 4096 + 65536) as disk:
        with pytest.raises(PackError, match=FULL):  # layers and pack together are too much
            quantize_policy(policy, preset("rtn"), None, out=disk / "p")
        assert not (disk / "p").exists()
        assert whole_and_finished(disk / "p.partial") > 5
        with pytest.raises(BundleError, match=FULL):
            write_bundle(place / "checkpoint", whole, disk / "b")
        calibration = calibrate(policy, tiny_samples(3), all_targets(policy))
        with pytest.raises(CalibrationError, match=FULL):
            calibration.save(disk / "c")
        assert [f.name for f in disk.iterdir()] == ["p.partial"]


def test_a_full_disk_and_the_other_files(tmp_path: Path) -> None:
    policy, samples = tiny_pi05(), tiny_samples(1)
    calibration = calibrate(policy, samples, all_targets(policy)[:3])
    path = tmp_path / "c"
    good = calibration.save(path).read_bytes()
    with disk_with(len(good) // 2), pytest.raises(CalibrationError, match=FULL):
        calibration.save(path)
    assert path.read_bytes() == good  # the older file is as it was
    assert Calibration.load(path).digest() == calibration.digest()
    with disk_with(100), pytest.raises(CalibrationError, match=FULL):
        write_observations(tmp_path / "o", samples.observations, samples.meta)
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_while_writing_the_bundles_small_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of a bundle's files are written by libraries that have errors of their own."""
    pack = quantize_policy(
        load_policy(place / "checkpoint"), preset("rtn"), None, out=tmp_path / "p"
    )

    class Full:
        def save(self, path: str) -> None:
            raise Exception("No space left on device (os error 28)")

    import omega_qvla.policies.pi05.processor as processor

    saved = processor.save_tokenizer
    monkeypatch.setattr(processor, "save_tokenizer", lambda _, folder: saved(Full(), folder))
    with pytest.raises(Exception, match=r"tokenizer cannot be written: No space") as caught:
        write_bundle(place / "checkpoint", pack, tmp_path / "b")
    assert re.search("CheckpointError|BundleError", type(caught.value).__name__)
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
