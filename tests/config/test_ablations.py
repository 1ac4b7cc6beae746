from __future__ import annotations

import pytest
import torch

from omega_qvla.config import Recipe, preset, resolve_recipe
from omega_qvla.config.ablations import ABLATIONS
from omega_qvla.config.recipe import ActivationScheme, Rotation, Scheme, WeightScheme
from omega_qvla.errors import RecipeError
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.stats import LayerStats


def plain(recipe: Recipe) -> dict[str, object]:
    return {key: value for key, value in recipe.to_dict().items() if key != "name"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_its_base_and_nothing_twice(name: str) -> None:
    recipe, base = ABLATIONS[name], preset(name.partition("+")[0])
    assert recipe.name == name
    assert resolve_recipe(name) is recipe
    assert plain(recipe) != plain(base)
    twins = [n for n, other in ABLATIONS.items() if plain(other) == plain(recipe)]
    assert twins == [name]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_pooled_scales_are_one_row_from_all_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = tuple(torch.randn(32, 16, generator=generator) * (1 + s) for s in range(3))
    x = torch.cat(tokens)
    stats = LayerStats(x.T @ x / len(x), torch.ones(16), tokens, len(x))
    weight = torch.randn(8, 16, generator=generator)

    def table(**values: object) -> torch.Tensor:
        activation = ActivationScheme("per_step_channel", percentile=100.0, **values)  # type: ignore[arg-type]
        scheme = Scheme(Rotation(), WeightScheme(), activation)
        layer = quantize_layer("x", "action_head", weight, None, scheme, stats, 3)
        assert layer.act_scale is not None
        return layer.act_scale

    pooled, by_step = table(pooled=True), table()
    assert pooled.shape == by_step.shape == (3, 16)
    assert torch.equal(pooled[0], pooled[2])
    assert torch.equal(pooled[0], by_step.amax(0))
    assert not torch.equal(by_step[0], by_step[2])


def test_pooling_without_a_table_is_refused() -> None:
    with pytest.raises(RecipeError, match="no table to pool"):
        ActivationScheme("per_token", pooled=True)
