"""Recipes: how each linear layer of a policy is quantized. Plain data, no torch.

A `Scheme` is the treatment of one layer, a `SideRecipe` that of one side of the policy
(backbone or action head), a `Recipe` both sides. Every value is checked when it is made,
so a recipe that exists can be executed; reading one from YAML refuses unknown keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

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
# Of a field that came after packs had been written: left out of what is written where it has its
# default, so that older recipes keep their text and their hashes.
_LATER = "later"


def _later(default: Any) -> Any:
    return field(default=default, metadata={_LATER: True})


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _choice(owner: str, value: str, literal: Any) -> None:
    allowed = get_args(literal)
    _need(value in allowed, f"{owner}: {value!r} is unknown; one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Rotation:
    """Orthogonal change of the input basis, undone in the weights.

    block: width of a block (a power of two); `full_hadamard` spans the whole width instead.
    `duquant`: two rotations, searched on the calibration tokens, with a permutation between
    them (see numerics/duquant.py).
    randomized: multiply by seeded random signs first (the only thing then stored).
    """

    kind: RotationKind = "none"
    block: int = 64
    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("rotation.kind", self.kind, RotationKind)
        power_of_two = self.block > 0 and self.block & (self.block - 1) == 0
        _need(power_of_two, f"rotation.block must be a power of two, not {self.block}")


@dataclass(frozen=True)
class Smoothing:
    """Per-channel divisor of the input, d = size(x)^alpha / size(w)^(1-alpha).

    robust: profile the tokens after dividing each by its own rms, so that one massive
    token cannot own the profile; of the `rms` profile only.
    profile: what a channel's size is. `rms`; `max`, the largest magnitude (SmoothQuant);
    `mean`, the mean magnitude, and the weights do not count: d = mean|x|^alpha (AWQ).
    search: take the alpha of least output error among 20 from 0 to .95 instead of the given.
    """

    alpha: float = 0.5
    robust: bool = True
    profile: Profile = "rms"
    search: bool = False

    def __post_init__(self) -> None:
        _choice("smoothing.profile", self.profile, Profile)
        _need(0 <= self.alpha <= 1, f"smoothing.alpha must lie in [0, 1], not {self.alpha}")


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
        _need(self.steps > 0, f"learning.steps must be positive, not {self.steps}")
        _need(self.batch > 0, f"learning.batch must be positive, not {self.batch}")
        rates = self.smooth_rate >= 0 and self.clip_rate >= 0
        _need(rates, "learning rates must not be negative")


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
    damp, block, act_order: of the two GPTQ methods; rank: low-rank part kept in 16 bits.
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
    signed: bool = _later(False)

    def __post_init__(self) -> None:
        _choice("weight.method", self.method, WeightMethod)
        _choice("weight.grid", self.grid, Grid)
        _need(
            self.bits in (2, 3, 4, 8, 16), f"weight.bits must be 2, 3, 4, 8 or 16, not {self.bits}"
        )
        rtn = self.method == "rtn"
        _need(rtn or self.grid != "output", "weight.grid `output` goes with method rtn")
        _need(rtn or self.clip == 1.0, "weight.clip goes with method rtn")
        _need(not (rtn and self.rounded_inputs), "weight.rounded_inputs goes with GPTQ")
        kept = self.bits == 16
        _need(not (kept and self.signed), "weight.signed: weights of 16 bits have no grid to turn")
        _need(0 < self.clip <= 1, f"weight.clip must lie in (0, 1], not {self.clip}")
        _need(self.group is None or self.group > 0, "weight.group must be positive or null")
        _need(self.damp > 0, f"weight.damp must be positive, not {self.damp}")
        _need(self.block > 0, f"weight.block must be positive, not {self.block}")
        _need(self.rank >= 0, f"weight.rank must not be negative, not {self.rank}")


@dataclass(frozen=True)
class ActivationScheme:
    """How inputs are rounded at run time.

    `per_token*` scales are dynamic; `per_step_*` come from a calibrated table with one row
    per denoising step. group: channels that share a scale in the `_group` kinds.
    clip: fraction of a dynamic absmax that is kept. percentile: of |x|, for static scales.
    pooled: static scales from the tokens of all steps together, the same in every step.
    bits: 4, 8, or 6, which no integer kernel has: emulated only.
    signed: dynamic scales have a sign, so that the value of largest magnitude maps to the integer
    of largest magnitude (-8 of -8..7), and are clip * absmax / 8 instead of / 7. A clip of up to
    8/7, where the two meet, is then possible. Emulated only.
    """

    kind: ActivationKind = "none"
    bits: int = 4
    group: int = 64
    clip: float = 1.0
    percentile: float = 99.9
    pooled: bool = False
    signed: bool = _later(False)

    def __post_init__(self) -> None:
        _choice("activation.kind", self.kind, ActivationKind)
        _need(self.bits in (4, 6, 8), f"activation.bits must be 4, 6 or 8, not {self.bits}")
        _need(
            self.static or not self.pooled,
            f"activation.pooled is for the per_step kinds; {self.kind} has no table to pool",
        )
        _need(self.group > 0, f"activation.group must be positive, not {self.group}")
        _need(
            self.dynamic or not self.signed,
            f"activation.signed is for the per_token kinds; {self.kind} has no scale that is made "
            "from its input",
        )
        most = 1 + 1 / (2 ** (self.bits - 1) - 1) if self.signed else 1.0
        _need(
            0 < self.clip <= most,
            f"activation.clip must lie in (0, {most:.4g}], not {self.clip}",
        )
        _need(0 < self.percentile <= 100, "activation.percentile must lie in (0, 100]")

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
        _choice("balance", self.balance, Balance)
        kept = self.weight.bits == 16
        _need(kept or self.balance == "none", "balance takes a layer with weight.bits 16")
        if kept:
            plain = self.rotation.kind == "none" and self.activation.kind == "none"
            plain &= self.smoothing is None and not self.permutation and not self.output_rotation
            plain &= self.weight == WeightScheme(bits=16)
            _need(plain, "a layer with weight.bits 16 takes nothing else but balance")
        if self.learning is not None:
            plain = self.rotation.kind == "none" and self.weight.method == "rtn"
            _need(
                self.smoothing is not None and plain and self.weight.rank == 0,
                "learning takes a smoothing to start from, and neither rotation, GPTQ nor rank",
            )
            signed = self.weight.signed or self.activation.signed
            _need(not signed, "learning moves positive scales; leave `signed` false")

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
        return _build(cls, data, "recipe")


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


def dump_yaml(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe as YAML, atomically."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def to_plain(value: Any) -> Any:
    """A recipe or a part of one as plain dicts, lists and scalars.

    Every field is spelled out, but for those that were added after packs had been written
    (`signed`): these appear only where they differ from their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get(_LATER) and getattr(value, f.name) == f.default)
        }
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


T = TypeVar("T")


def _build(cls: type[T], data: Any, where: str) -> T:
    """Make dataclass `cls` from a mapping, naming the place of whatever does not fit."""
    _need(isinstance(data, Mapping), f"{where}: expected a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, data)) - set(fields))
    _need(
        not unknown,
        f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}",
    )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in data
    ]
    _need(not missing, f"{where}: missing {', '.join(missing)}")
    values = {key: _convert(hints[key], item, f"{where}.{key}") for key, item in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        _need(value in arguments, f"{where}: {value!r} is unknown; one of {arguments}")
        return value
    if origin is tuple:
        _need(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            items = enumerate(value)
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in items)
        _need(len(value) == len(arguments), f"{where}: expected {len(arguments)} entries")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(pairs))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _need(fits, f"{where}: expected {hint.__name__}, got {value!r}")
    return value
