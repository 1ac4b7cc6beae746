"""Configuration as frozen dataclasses: recipes and presets. Nothing here imports torch."""

from omega_qvla.config.presets import PRESETS, preset, resolve_recipe
from omega_qvla.config.recipe import (
    ActivationScheme,
    Learning,
    Recipe,
    Rotation,
    Scheme,
    SideRecipe,
    Smoothing,
    WeightScheme,
)

__all__ = [
    "PRESETS",
    "ActivationScheme",
    "Learning",
    "Recipe",
    "Rotation",
    "Scheme",
    "SideRecipe",
    "Smoothing",
    "WeightScheme",
    "preset",
    "resolve_recipe",
]
