from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omega_qvla.config import (
    PRESETS,
    ActivationScheme,
    Learning,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
    WeightScheme,
    preset,
    resolve_recipe,
)
from omega_qvla.config.recipe import dump_yaml, load_yaml
from omega_qvla.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", list(PRESETS))
def test_bundled_yaml_equals_preset(name: str) -> None:
    assert load_yaml(RECIPES / f"{name}.yaml") == preset(name)


@pytest.mark.parametrize("name", list(PRESETS))
def test_round_trips(name: str, tmp_path: Path) -> None:
    recipe = preset(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    dump_yaml(recipe, tmp_path / "r.yaml")
    assert resolve_recipe(tmp_path / "r.yaml") == recipe
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_overrides_round_trip_and_first_match_wins() -> None:
    special, other = Scheme(Rotation("svd")), Scheme(Rotation("hadamard"))
    side = SideRecipe(Scheme(), overrides=((r"down_proj$", special), (r"proj", other)))
    recipe = Recipe("mine", side, None)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert side.scheme_for("layers.0.mlp.down_proj") is special
    assert side.scheme_for("layers.0.q_proj") is other
    assert side.scheme_for("fc") is side.scheme


def test_every_preset_says_what_it_is() -> None:
    for name, make in PRESETS.items():
        first = (make.__doc__ or "").strip().split("\n\n")[0]
        assert first.endswith(".") and make().name == name, name


def test_native() -> None:
    emulated = [name for name in PRESETS if not preset(name).backbone.scheme.native]  # type: ignore[union-attr]
    assert emulated == ["omega-paper", "w4a16", "gptq-w4a16", "awq-w4a16", "quantvla-w4a4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "unknown key bits"),
        ({"version": 2}, "version 2"),
        ({"allow_protected": 1}, "recipe.allow_protected: expected bool"),
        ({"backbone": {"scheme": {"rotation": {"knd": "svd"}}}}, "recipe.backbone.scheme.rotation"),
        ({"backbone": {"scheme": {"rotation": {"kind": "dct"}}}}, "'dct' is unknown"),
        ({"backbone": {"scheme": {"weight": {"bits": True}}}}, "expected int"),
        ({"backbone": {"scheme": {}, "include": "("}}, "bad regular expression"),
        ({"backbone": {}}, "missing scheme"),
        ({"backbone": []}, "expected a mapping"),
        ({"backbone": {"scheme": {}, "overrides": [["a"]]}}, "expected 2 entries"),
    ],
)
def test_from_dict_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(preset("omega").to_dict() | change)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Rotation, {"block": 48}),
        (Rotation, {"block": 0}),
        (WeightScheme, {"bits": 5}),
        (WeightScheme, {"clip": 0.0}),
        (WeightScheme, {"clip": 0.9, "method": "gptq"}),
        (WeightScheme, {"grid": "output", "method": "gptq"}),
        (WeightScheme, {"rounded_inputs": True}),
        (Smoothing, {"alpha": 1.5}),
        (Smoothing, {"profile": "median"}),
        (Learning, {"steps": 0}),
        (Learning, {"clip_rate": -1.0}),
        (Scheme, {"learning": Learning()}),
        (Scheme, {"learning": Learning(), "smoothing": Smoothing(), "rotation": Rotation("svd")}),
        (WeightScheme, {"group": 0}),
        (WeightScheme, {"damp": 0.0}),
        (WeightScheme, {"rank": -1}),
        (ActivationScheme, {"bits": 3}),
        (ActivationScheme, {"clip": 0.0}),
        (ActivationScheme, {"percentile": 101.0}),
    ],
)
def test_impossible_values_are_refused(cls: type, values: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        cls(**values)


def test_unknown_recipe_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="omega-paper"):
        resolve_recipe("omgea")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        resolve_recipe(tmp_path / "bad.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        resolve_recipe(tmp_path / "none.yaml")


def test_frozen_and_without_torch() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("rtn").name = "other"  # type: ignore[misc]
    code = "import sys, omega_qvla.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationScheme("per_step_group", signed=True), "activation.signed is for the"),
        (lambda: ActivationScheme("none", signed=True), "activation.signed is for the per_token"),
        (lambda: ActivationScheme("per_token", clip=1.2, signed=True), "must lie in \\(0, 1.143"),
        (lambda: ActivationScheme("per_token", clip=1.05), "must lie in \\(0, 1]"),
        (lambda: WeightScheme(bits=16, signed=True), "weight.signed"),
        (
            lambda: Scheme(
                weight=WeightScheme(signed=True), smoothing=Smoothing(), learning=Learning()
            ),
            "leave `signed` false",
        ),
    ],
)
def test_signed_is_refused_where_it_means_nothing(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_recipes_from_before_signed_scales_keep_their_text() -> None:
    """The digest is of what was written before the field existed: hashes in packs hold."""
    assert "signed" not in json.dumps([preset(name).to_dict() for name in PRESETS])
    text = json.dumps(preset("omega").to_dict(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith("b78ed09dd456170d")


def test_signed_scales_are_written_and_read() -> None:
    scheme = Scheme(
        weight=WeightScheme(signed=True), activation=ActivationScheme("per_token", signed=True)
    )
    recipe = Recipe("mine", SideRecipe(scheme), None)
    plain = recipe.to_dict()["backbone"]["scheme"]
    assert plain["weight"]["signed"] is True and plain["activation"]["signed"] is True
    assert Recipe.from_dict(recipe.to_dict()) == recipe
