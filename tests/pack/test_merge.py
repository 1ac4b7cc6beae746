from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from omega_qvla.config import preset
from omega_qvla.errors import PackError
from omega_qvla.pack import merge_packs, read_pack, write_pack
from omega_qvla.pack.merge import merge_recipes
from pack.layers import RECIPE, make_layer, make_manifest

BACKBONE = dataclasses.replace(RECIPE, action_head=None)
HEAD = dataclasses.replace(RECIPE, backbone=None)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "backbone", tmp_path / "head"
    write_pack(one, make_manifest(recipe=BACKBONE.to_dict()), {"b": make_layer("b")})
    head = make_layer("h", "randomized", 1, "action_head")
    write_pack(two, make_manifest(recipe=HEAD.to_dict()), {"h": head})
    return one, two


def test_merging_the_sides_is_building_both(sides: tuple[Path, Path], tmp_path: Path) -> None:
    merge_packs(sides, tmp_path / "merged")
    layers = {"b": make_layer("b"), "h": make_layer("h", "randomized", 1, "action_head")}
    write_pack(tmp_path / "both", make_manifest(recipe=RECIPE.to_dict()), layers)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "both").read_bytes()
    merge_packs(sides[::-1], tmp_path / "reversed")
    assert (tmp_path / "reversed").read_bytes() == (tmp_path / "both").read_bytes()


def test_overlapping_packs(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"both hold 1 layer.*first b"):
        merge_packs([sides[0], sides[1], sides[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"net.0.weight": "a" * 64, "net.1.weight": "c" * 64}}, r"net\.1\.weight"),
        ({"source": {"net.0.weight": "a" * 64}}, r"different checkpoints.*net\.1\.weight"),
        ({"num_steps": 4}, r"num_steps differs \(3 against 4\)"),
        ({"family": "groot_n15"}, "family differs"),
        ({"config": {}}, "config differs"),
        ({"software": {"omega_qvla": "1"}}, "software differs"),
    ],
)
def test_mismatched_packs(
    sides: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_pack(tmp_path / "other", make_manifest(**changes), {"x": make_layer("x")})
    with pytest.raises(PackError, match=message):
        merge_packs([sides[0], tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_pack_or_a_damaged_one(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PackError, match="at least two"):
        merge_packs(sides[:1], tmp_path / "out")
    sides[1].write_bytes(sides[1].read_bytes()[:-1])
    with pytest.raises(PackError, match="truncated"):
        merge_packs(sides, tmp_path / "out")


def test_differing_calibrations_are_both_told(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_manifest(recipe=HEAD.to_dict(), calibration={"source": "elsewhere"})
    write_pack(tmp_path / "other", other, {"x": make_layer("x", side="action_head")})
    merge_packs([sides[0], tmp_path / "other"], tmp_path / "out")
    parts = read_pack(tmp_path / "out").manifest.calibration["parts"]
    assert parts == [{"source": "test", "count": 2}, {"source": "elsewhere"}]


def test_recipes_of_both_sides_become_one() -> None:
    paper = dataclasses.replace(preset("omega-paper"), backbone=None)
    merged = merge_recipes([BACKBONE.to_dict(), paper.to_dict()])
    assert merged["name"] == "omega+omega-paper"
    assert merged["backbone"] == RECIPE.to_dict()["backbone"]
    assert merged["action_head"] == paper.to_dict()["action_head"]
    assert merge_recipes([RECIPE.to_dict(), RECIPE.to_dict()]) == RECIPE.to_dict()
    both = merge_recipes([RECIPE.to_dict(), preset("omega-paper").to_dict()])
    assert [part["name"] for part in both["parts"]] == ["omega", "omega-paper"]
