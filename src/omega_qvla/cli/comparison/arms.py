"""What can be compared: a recipe, calibrated in a certain way, under one name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from omega_qvla.config.ablations import ABLATIONS
from omega_qvla.config.presets import PRESETS, resolve_recipe
from omega_qvla.config.recipe import Recipe
from omega_qvla.errors import ConfigError
from omega_qvla.evaluation.records import REFERENCE

#: The word behind `@` for a build whose action head is calibrated under its backbone.
CASCADE = "cascade"
#: Calibrations of the ablations: numbers of observations, and the cascade.
_CALIBRATED = tuple(
    f"{base}@{how}"
    for base in ("omega-paper", "omega")
    for how in ("2", "10", "50", "100", CASCADE)
)
#: Names for many at once.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "presets": tuple(PRESETS),
        "ablations": ("omega-paper", "omega", *ABLATIONS, *_CALIBRATED),
    }
)


@dataclass(frozen=True)
class ArmSpec:
    """One quantized arm.

    name: unique in a comparison; names its pack.
    samples: calibration observations, where not the comparison's own number.
    cascade: calibrate the action head under the quantized backbone.
    """

    name: str
    recipe: Recipe
    samples: int | None = None
    cascade: bool = False

    def settings(self) -> dict[str, Any]:
        """What its pack depends on besides checkpoint and observations, JSON-ready."""
        return {"recipe": self.recipe.to_dict(), "samples": self.samples, "cascade": self.cascade}


def parse_arm(text: str) -> ArmSpec:
    """An arm from `RECIPE[@SAMPLES][@cascade]`: a preset, an ablation or a YAML file.

    Raises:
        RecipeError: no such recipe.
        ConfigError: something else behind an `@`, or a name that no file can have.
    """
    name, *options = text.split("@")
    recipe = resolve_recipe(name)
    samples, cascade = None, False
    for option in options:
        if options.count(option) > 1 or (samples is not None and option != CASCADE):
            raise ConfigError(f"{text!r} says twice how it is calibrated; say it once")
        if option == CASCADE:
            cascade = True
        elif option.isdecimal() and int(option) > 0:
            samples = int(option)
        else:
            raise ConfigError(
                f"{text!r}: {option!r} is neither a number of calibration observations nor "
                f"{CASCADE!r}; write RECIPE, RECIPE@10, RECIPE@{CASCADE}"
            )
    label = text if name in PRESETS or name in ABLATIONS else "@".join([recipe.name, *options])
    if label == REFERENCE or "/" in label or label.startswith("."):
        raise ConfigError(
            f"{text!r} is called {label!r}, and results and packs are named after it: a name "
            f"without slashes, that starts with no dot and is not {REFERENCE!r}"
        )
    return ArmSpec(label, recipe, samples, cascade)


def parse_arms(texts: Iterable[str]) -> tuple[ArmSpec, ...]:
    """Arms from names, each perhaps several with commas, or a group of `GROUPS`.

    Raises:
        RecipeError, ConfigError: as `parse_arm`; or two arms of one name, or none.
    """
    names = [name for text in texts for name in text.split(",") if name]
    wanted = dict.fromkeys(name for text in names for name in GROUPS.get(text, (text,)))
    arms = tuple(parse_arm(name) for name in wanted)
    labels = [arm.name for arm in arms]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not arms:
        raise ConfigError(
            f"two recipes are called {twice[0]!r}: give each its own name"
            if twice
            else "no recipe is named"
        )
    return arms


def describe(arm: ArmSpec) -> str:
    """A line about an arm: the first sentence on its preset, or what an ablation changes."""
    words = []
    base, _, change = arm.recipe.name.partition("+")
    if arm.recipe.name in PRESETS:
        first, *_ = (PRESETS[arm.recipe.name].__doc__ or "").strip().split("\n\n")
        words.append(" ".join(first.split()))
    elif base in PRESETS and change:
        words.append(f"{base} with {change.replace('+', ' and ').replace('-', ' ')}.")
    else:
        words.append(f"recipe {arm.recipe.name}.")
    if arm.samples is not None:
        words.append(f"Calibrated on {arm.samples} observations.")
    if arm.cascade:
        words.append("Action head calibrated under the quantized backbone.")
    return " ".join(words)
