"""Checked fields of a recipe's frozen dataclasses, and their way to plain data and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar, get_args, get_origin

from omega_qvla.errors import RecipeError

T = TypeVar("T")
# Of a field that came after packs had been written: left out of what is written where it has its
# default, so that older recipes keep their text and their hashes.
_LATER = "later"


def later(default: Any) -> Any:
    """A field that came after packs had been written."""
    return field(default=default, metadata={_LATER: True})


def need(condition: bool, message: str) -> None:
    """Raise RecipeError unless `condition` holds."""
    if not condition:
        raise RecipeError(message)


def choice(owner: str, value: str, literal: Any) -> None:
    """Raise RecipeError unless `value` is one of a Literal's."""
    allowed = get_args(literal)
    need(value in allowed, f"{owner}: {value!r} is unknown; one of {', '.join(allowed)}")


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


def from_plain(cls: type[T], data: Any, where: str) -> T:
    """Make dataclass `cls` from a mapping; missing fields take their defaults.

    Raises:
        RecipeError: an unknown key, a missing one, a value of the wrong type or range; `where`
            and the key say which.
    """
    need(isinstance(data, Mapping), f"{where}: expected a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, data)) - set(fields))
    need(
        not unknown,
        f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}",
    )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in data
    ]
    need(not missing, f"{where}: missing {', '.join(missing)}")
    values = {key: _convert(hints[key], item, f"{where}.{key}") for key, item in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        need(value in arguments, f"{where}: {value!r} is unknown; one of {arguments}")
        return value
    if origin is tuple:
        need(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            items = enumerate(value)
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in items)
        need(len(value) == len(arguments), f"{where}: expected {len(arguments)} entries")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(pairs))
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    need(fits, f"{where}: expected {hint.__name__}, got {value!r}")
    return value
