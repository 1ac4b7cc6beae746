"""Recipes: how each linear layer of a policy is quantized. Plain data, no torch.

A `Scheme` is the treatment of one layer, a `SideRecipe` that of one side of the policy
(backbone or action head), a `Recipe` both sides. Every value is checked when it is made,
so a recipe that exists can be executed; reading one from YAML refuses unknown keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from omega_qvla.config.fields import choice, from_plain, later, need, to_plain
from omega_qvla.errors import RecipeError

RotationKind = Literal["none", "hadamard", "svd", "svd_hadamard", "full_hadamard", "duquant"]
WeightMethod = Literal["rtn", "gptq", "gptq_block"]
Grid = Literal["paper", "fine", "max", "output"]
Profile = Literal["rms", "max", "mean"]
Balance = Literal["none", "temperature", "output"]
ActivationKind = Literal[
    "none",
    "per_token",
    "per_token_group",
    "per_step_tensor",
    "per_step_group",
    "per_step_channel",
]
RECIPE_VERSION = 1


@dataclass(frozen=True)
class Rotation:
    """Orthogonal change of the input basis, undone in the weights.

    block: width of a block (a power of two); `full_hadamard` spans the whole width instead.
    `duquant`: two rotations, searched on the calibration tokens, with a permutation between
    them (see numerics/duquant.py).
    randomized: multiply by seeded random signs first (the only thing then stored); of the two
    Hadamard kinds.
    """

    kind: RotationKind = "none"
    block: int = 64
    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choice("rotation.kind", self.kind, RotationKind)
        power_of_two = self.block > 0 and self.block & (self.block - 1) == 0
        need(power_of_two, f"rotation.block must be a power of two, not {self.block}")
        need(
            self.kind in ("hadamard", "full_hadamard") or not self.randomized,
            f"rotation.randomized is of the kinds hadamard and full_hadamard; {self.kind} has no "
            "signs: leave it false",
        )


@dataclass(frozen=True)
class Smoothing:
    """Per-channel divisor of the input, d = size(x)^alpha / size(w)^(1-alpha).

    robust: profile the tokens after dividing each by its own rms, so that one massive
    token cannot own the profile; of the `rms` profile only.
    profile: what a channel's size is. `rms`; `max`, the largest magnitude (SmoothQuant);
    `mean`, the mean magnitude, and the weights do not count: d = mean|x|^alpha (AWQ).
    search: take the alpha of least output error among 20 from 0 to .95 instead of the given;
    not with static activation scales, which are made after it.
    """

    alpha: float = 0.5
    robust: bool = True
    profile: Profile = "rms"
    search: bool = False

    def __post_init__(self) -> None:
        choice("smoothing.profile", self.profile, Profile)
        need(0 <= self.alpha <= 1, f"smoothing.alpha must lie in [0, 1], not {self.alpha}")


@dataclass(frozen=True)
class Learning:
    """Smoothing divisor and weight clipping by gradient descent (see numerics/learned.py).

    steps: of Adam, each on `batch` calibration tokens. smooth_rate, clip_rate: learning rates.
    """

    steps: int = 200
    batch: int = 256
    smooth_rate: float = 5e-3
    clip_rate: float = 1e-2

    def __post_init__(self) -> None:
        need(self.steps > 0, f"learning.steps must be positive, not {self.steps}")
        need(self.batch > 0, f"learning.batch must be positive, not {self.batch}")
        rates = self.smooth_rate >= 0 and self.clip_rate >= 0
        need(rates, "learning rates must not be negative")


@dataclass(frozen=True)
class WeightScheme:
    """How weights are rounded.

    bits: 2, 3, 4, 8; 16 keeps the weight in half precision (a layer that a recipe leaves out
    of quantization but rescales).
    group: columns that share a scale; None = one scale per row.
    grid: candidates of the scale search; `max` is absmax/qmax without a search, `output`
    searches for the least output error on the calibration tokens instead of the least error
    of the weights (AWQ's clipping).
    clip: fraction of absmax that all candidates start from; of `rtn` only.
    rounded_inputs: GPTQ under the moments of the inputs as they will be rounded instead of
    exact ones, so that it does not trade large weights against each other that would carry
    rounding noise; dynamic activation kinds only.
    damp, block: of the two GPTQ methods; act_order: of `gptq`. The other methods have no use for
    them and say nothing: a recipe that differs in its method alone keeps them.
    rank: low-rank part kept in 16 bits.
    signed: scales have a sign, so that the largest weight of a row or group maps to the integer
    of largest magnitude (-8 of -8..7): candidates are fractions of absmax/8 instead of absmax/7.
    """

    bits: int = 4
    group: int | None = None
    method: WeightMethod = "rtn"
    grid: Grid = "fine"
    damp: float = 0.01
    block: int = 128
    act_order: bool = False
    rank: int = 0
    clip: float = 1.0
    rounded_inputs: bool = False
    signed: bool = later(False)

    def __post_init__(self) -> None:
        choice("weight.method", self.method, WeightMethod)
        choice("weight.grid", self.grid, Grid)
        need(
            self.bits in (2, 3, 4, 8, 16), f"weight.bits must be 2, 3, 4, 8 or 16, not {self.bits}"
        )
        rtn = self.method == "rtn"
        need(rtn or self.grid != "output", "weight.grid `output` goes with method rtn")
        need(rtn or self.clip == 1.0, "weight.clip goes with method rtn")
        need(not (rtn and self.rounded_inputs), "weight.rounded_inputs goes with GPTQ")
        kept = self.bits == 16
        need(not (kept and self.signed), "weight.signed: weights of 16 bits have no grid to turn")
        need(0 < self.clip <= 1, f"weight.clip must lie in (0, 1], not {self.clip}")
        need(self.group is None or self.group > 0, "weight.group must be positive or null")
        need(self.damp > 0, f"weight.damp must be positive, not {self.damp}")
        need(self.block > 0, f"weight.block must be positive, not {self.block}")
        need(self.rank >= 0, f"weight.rank must not be negative, not {self.rank}")


@dataclass(frozen=True)
class ActivationScheme:
    """How inputs are rounded at run time.

    `per_token*` scales are dynamic; `per_step_*` come from a calibrated table with one row
    per denoising step. group: channels that share a scale in the `_group` kinds.
    clip: fraction of a dynamic absmax that is kept; static kinds have no use for it and say
    nothing. percentile: of |x|, for `per_step_channel`; the other static kinds search.
    pooled: static scales from the tokens of all steps together, the same in every step.
    bits: 4, 8, or 6, which no integer kernel has: emulated only.
    signed: dynamic scales have a sign, so that the value of largest magnitude M is on the side of
    the integer of largest magnitude (-8 of -8..7). With m the largest magnitude on the other side
    they are max(M / 8, clip * m / 7) instead of clip * M / 7: `clip` cuts the other side alone.
    """

    kind: ActivationKind = "none"
    bits: int = 4
    group: int = 64
    clip: float = 1.0
    percentile: float = 99.9
    pooled: bool = False
    signed: bool = later(False)

    def __post_init__(self) -> None:
        choice("activation.kind", self.kind, ActivationKind)
        need(self.bits in (4, 6, 8), f"activation.bits must be 4, 6 or 8, not {self.bits}")
        need(
            self.static or not self.pooled,
            f"activation.pooled is for the per_step kinds; {self.kind} has no table to pool",
        )
        need(self.group > 0, f"activation.group must be positive, not {self.group}")
        need(
            self.dynamic or not self.signed,
            f"activation.signed is for the per_token kinds; {self.kind} has no scale that is made "
            "from its input",
        )
        need(0 < self.clip <= 1, f"activation.clip must lie in (0, 1], not {self.clip}")
        need(0 < self.percentile <= 100, "activation.percentile must lie in (0, 100]")
        need(
            self.kind == "per_step_channel" or self.percentile == 99.9,
            f"activation.percentile is for per_step_channel; {self.kind} takes none: leave it out",
        )

    @property
    def static(self) -> bool:
        """Whether a calibrated table is looked up by the running denoising step."""
        return self.kind.startswith("per_step")

    @property
    def dynamic(self) -> bool:
        """Whether scales are made from the input itself."""
        return self.kind.startswith("per_token")


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized.

    balance: of a layer with 16-bit weights, scale its rows so that what it puts out is as in
    full precision: `temperature`, queries, by the spread of each head's logits; `output`, an
    output projection, by its rms (see calibration/balance.py).
    """

    rotation: Rotation = Rotation()
    weight: WeightScheme = WeightScheme()
    activation: ActivationScheme = ActivationScheme()
    smoothing: Smoothing | None = None
    permutation: bool = False
    output_rotation: bool = False
    learning: Learning | None = None
    balance: Balance = "none"

    def __post_init__(self) -> None:
        choice("balance", self.balance, Balance)
        kept = self.weight.bits == 16
        need(kept or self.balance == "none", "balance takes a layer with weight.bits 16")
        if kept:
            plain = self.rotation.kind == "none" and self.activation.kind == "none"
            plain &= self.smoothing is None and not self.permutation and not self.output_rotation
            plain &= self.weight == WeightScheme(bits=16)
            need(plain, "a layer with weight.bits 16 takes nothing else but balance")
        need(
            not (self.permutation and self.rotation.kind == "duquant"),
            "permutation: a duquant rotation brings its own; leave it false",
        )
        self._check_searches()
        if self.learning is not None:
            self._check_learning()

    def _check_searches(self) -> None:
        """Raise RecipeError where a search would round inputs as nobody knows yet."""
        activation = self.activation
        need(
            not (self.smoothing is not None and self.smoothing.search and activation.static),
            f"smoothing.search judges rounded inputs, and {activation.kind} has no scales before "
            "the smoothing: set it to false and give smoothing.alpha, or take an activation.kind "
            "of per_token or per_token_group",
        )
        need(
            activation.dynamic or not self.weight.rounded_inputs,
            f"weight.rounded_inputs takes an activation.kind of per_token or per_token_group, not "
            f"{activation.kind}: set it to false",
        )

    def _check_learning(self) -> None:
        """Raise RecipeError where `numerics.learned` could not learn or would be ignored."""
        weight, activation = self.weight, self.activation
        need(self.smoothing is not None, "learning starts from a smoothing: give one")
        need(
            self.rotation.kind == "none" and not self.output_rotation,
            "learning does not know of rotations: set rotation.kind none, output_rotation false",
        )
        need(
            weight.method == "rtn" and weight.rank == 0,
            "learning rounds to nearest: set weight.method rtn and weight.rank 0",
        )
        need(weight.group is None, "learning has one scale per row: leave weight.group null")
        need(
            weight.clip == 1.0 and weight.grid != "output",
            "learning finds the clipping itself: leave weight.clip 1, and weight.grid at `max`",
        )
        need(
            activation.kind in ("none", "per_token"),
            f"learning takes an activation.kind of per_token or none, not {activation.kind}",
        )
        signed = weight.signed or activation.signed
        need(not signed, "learning moves positive scales; leave `signed` false")

    @property
    def native(self) -> bool:
        """Whether the product can run on integers: its scales factor out of the sum."""
        return self.activation.kind not in ("none", "per_step_channel")


@dataclass(frozen=True)
class SideRecipe:
    """The treatment of one side of a policy.

    include, exclude: regexes searched in qualified layer names; None = the family's own.
    overrides: (regex, scheme) pairs; the first regex found in a name replaces `scheme`.
    """

    scheme: Scheme
    include: str | None = None
    exclude: str | None = None
    overrides: tuple[tuple[str, Scheme], ...] = ()

    def __post_init__(self) -> None:
        patterns = [self.include, self.exclude, *(regex for regex, _ in self.overrides)]
        for pattern in patterns:
            if pattern is not None:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise RecipeError(f"bad regular expression {pattern!r}: {error}") from error

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that a layer may get."""
        return (self.scheme, *(scheme for _, scheme in self.overrides))

    def scheme_for(self, name: str) -> Scheme:
        """The scheme of the layer called `name`."""
        for regex, scheme in self.overrides:
            if re.search(regex, name):
                return scheme
        return self.scheme


@dataclass(frozen=True)
class Recipe:
    """The treatment of a whole policy; a side that is None stays as it is.

    allow_protected: let the regexes catch the small heads, which collapse at 4 bits.
    """

    name: str
    backbone: SideRecipe | None
    action_head: SideRecipe | None
    version: int = RECIPE_VERSION
    allow_protected: bool = False

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise RecipeError(
                f"recipe {self.name!r} has version {self.version}; this program reads version "
                f"{RECIPE_VERSION}"
            )

    def side(self, name: str) -> SideRecipe | None:
        """The recipe of side `backbone` or `action_head`."""
        if name not in ("backbone", "action_head"):
            raise RecipeError(f"unknown side {name!r}; one of backbone, action_head")
        side: SideRecipe | None = getattr(self, name)
        return side

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as `to_plain` has them."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            RecipeError: an unknown key, a missing name, a value of the wrong type or range.
        """
        return from_plain(cls, data, "recipe")


def load_yaml(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML file. Raises RecipeError naming the file and the fault."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read recipe {os.fspath(path)!r}: {error}") from error
    try:
        return Recipe.from_dict(data)
    except RecipeError as error:
        raise RecipeError(f"{os.fspath(path)}: {error}") from error
