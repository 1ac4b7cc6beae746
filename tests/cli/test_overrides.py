"""Recipe fields set on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.cli.main import main
from omega_qvla.cli.overrides import OVERRIDES, add_overrides, override
from omega_qvla.config import Recipe, Scheme, SideRecipe, preset
from omega_qvla.errors import RecipeError
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

BOTH = ("backbone", "action_head")


def change(name: str, *words: str, sides: tuple[str, ...] = BOTH) -> Recipe:
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    return override(preset(name), parser.parse_args(words), sides)


def schemes(recipe: Recipe) -> tuple[Scheme, Scheme]:
    assert recipe.backbone is not None and recipe.action_head is not None
    return recipe.backbone.scheme, recipe.action_head.scheme


@pytest.mark.parametrize(
    ("name", "flag", "value", "path", "before", "after"),
    [
        ("omega", "weight-bits", "3", "weight.bits", (4, 4), (3, 3)),
        ("omega", "act-bits", "8", "activation.bits", (4, 4), (8, 8)),
        ("omega-paper", "svd-rank", "16", "weight.rank", (0, 0), (16, 16)),
        (
            "omega-paper",
            "act-percentile",
            "99.5",
            "activation.percentile",
            (99.9,) * 2,
            (99.5,) * 2,
        ),
        ("omega-paper", "block-size", "64", "weight.block", (128, 128), (64, 64)),
        ("omega-paper", "block-size", "64", "weight.group", (128, 128), (64, 64)),
        ("omega", "block-size", "64", "weight.group", (None, None), (None, None)),
        ("omega", "rotation-block", "32", "rotation.block", (64, 64), (32, 32)),
        ("omega-paper", "damp", "0.1", "weight.damp", (0.05, 0.01), (0.1, 0.01)),
    ],
)
def test_each_flag_sets_its_field(
    name: str, flag: str, value: str, path: str, before: Any, after: Any
) -> None:
    def read(recipe: Recipe) -> tuple[Any, ...]:
        part, field = path.split(".")
        return tuple(getattr(getattr(scheme, part), field) for scheme in schemes(recipe))

    assert read(preset(name)) == before
    changed = change(name, f"--{flag}", value)
    assert read(changed) == after
    assert changed.name == f"{name}+{flag}={value}"


def test_every_flag_is_tested() -> None:
    tested = {"weight-bits", "act-bits", "svd-rank", "act-percentile", "block-size", "damp"}
    assert tested | {"rotation-block"} == set(OVERRIDES)


def test_no_flag_changes_nothing() -> None:
    assert change("omega") == preset("omega")


def test_a_side_left_alone_stays_as_it_is() -> None:
    changed = change("omega", "--svd-rank", "7", sides=("backbone",))
    assert changed.action_head == preset("omega").action_head
    assert schemes(changed)[0].weight.rank == 7


def test_schemes_of_single_layers_follow() -> None:
    first = preset("omega").backbone
    assert first is not None
    recipe = Recipe("r", SideRecipe(first.scheme, overrides=(("k", first.scheme),)), None)
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    changed = override(recipe, parser.parse_args(["--act-bits", "8"]), BOTH)
    assert changed.backbone is not None
    assert changed.backbone.overrides[0][1].activation.bits == 8


def test_layers_that_a_recipe_keeps_in_16_bits_stay_so() -> None:
    changed = change("quantvla-w4a4", "--weight-bits", "3", "--svd-rank", "2")
    head, before = changed.action_head, preset("quantvla-w4a4").action_head
    assert head is not None and before is not None
    assert (head.scheme.weight.bits, head.scheme.weight.rank) == (3, 2)
    assert head.overrides == before.overrides


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtn", ["--damp", "0.1"]),
        ("rtn", ["--block-size", "64"]),
        ("rtn", ["--rotation-block", "64"]),
        ("omega", ["--act-percentile", "99"]),
        ("w4a16", ["--act-bits", "8"]),
    ],
)
def test_a_flag_without_effect_is_refused(name: str, words: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"{words[0]} changes nothing"):
        change(name, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--weight-bits", "5"],
        ["--act-bits", "5"],
        ["--rotation-block", "48"],
        ["--damp", "0"],
    ],
)
def test_an_impossible_value_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError):
        change("omega", *words)


def test_the_pack_is_made_with_the_fields_given(tmp_path: Path) -> None:
    save_policy(tiny_pi05(num_steps=2), tmp_path / "checkpoint")
    words = [f"{tmp_path}/checkpoint", "--recipe", "rtn", "--out", f"{tmp_path}/p.safetensors"]
    words += ["--weight-bits", "3", "--act-bits", "8", "--svd-rank", "2", "--quiet"]
    assert main(["quantize", *words]) == 0
    pack = read_pack(tmp_path / "p.safetensors")
    assert pack.manifest.recipe["name"] == "rtn+weight-bits=3+act-bits=8+svd-rank=2"
    for layer in pack.layers.values():
        assert layer.integers().abs().max() <= 4
        assert layer.scheme.activation.bits == 8
        assert layer.lowrank_a is not None and layer.lowrank_a.shape[1] == 2
