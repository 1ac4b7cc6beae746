"""Joining packs of one checkpoint, e.g. one of the backbone and one of the action head."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.pack.manifest import Manifest
from omega_qvla.pack.reader import Pack, read_pack
from omega_qvla.pack.writer import write_pack
from omega_qvla.policies.base import SIDES

_MUST_AGREE = ("format_version", "family", "config", "num_steps", "software")


def merge_packs(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write one pack with the layers of all `paths`; each is verified first.

    Packs of the two sides built by one recipe from one calibration merge into exactly the
    file that building both sides at once gives. Where recipes (or calibrations) differ and
    do not simply complete each other, the merged one lists them under "parts".

    Raises:
        PackError: fewer than two packs, a layer in two of them, another checkpoint, or another
            format version, family, configuration, step count or software.
    """
    if len(paths) < 2:
        raise PackError(f"merging takes at least two packs, got {len(paths)}")
    packs = [read_pack(path) for path in paths]
    layers: dict[str, QuantizedLayer] = {}
    owner: dict[str, Path] = {}
    for pack in packs:
        _check_agreement(packs[0], pack)
        twice = sorted(set(layers) & set(pack.layers))
        if twice:
            raise PackError(
                f"{pack.path} and {owner[twice[0]]} both hold {len(twice)} layer(s), first "
                f"{twice[0]}; packs must be disjoint to merge"
            )
        layers.update(pack.layers)
        owner.update(dict.fromkeys(pack.layers, pack.path))
    manifest = dataclasses.replace(
        packs[0].manifest,
        recipe=merge_recipes([pack.manifest.recipe for pack in packs]),
        calibration=_merge_calibrations([pack.manifest for pack in packs]),
    )
    write_pack(out, manifest, layers)
    return Path(out)


def _check_agreement(first: Pack, other: Pack) -> None:
    for field in _MUST_AGREE:
        mine, theirs = getattr(first.manifest, field), getattr(other.manifest, field)
        if mine != theirs:
            raise PackError(
                f"{first.path} and {other.path} cannot be merged: {field} differs "
                f"({_short(mine)} against {_short(theirs)})"
            )
    differing = differing_tensors(first.manifest.source, other.manifest.source)
    if differing:
        raise PackError(
            f"{first.path} and {other.path} are packs of different checkpoints: "
            f"{len(differing)} source tensor(s) differ, first {differing[0]}"
        )


def differing_tensors(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names whose hash differs or that only one side has, sorted."""
    names = set(one) | set(other)
    return sorted(name for name in names if one.get(name) != other.get(name))


def merge_recipes(recipes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One recipe that says what all of `recipes` did: equal, completing each other, or parts."""
    if all(recipe == recipes[0] for recipe in recipes):
        return recipes[0]
    names = list(dict.fromkeys(str(recipe.get("name")) for recipe in recipes))
    sides: dict[str, Any] = {}
    complete = all("parts" not in recipe for recipe in recipes)
    for side in SIDES:
        given = [recipe[side] for recipe in recipes if recipe.get(side) is not None]
        complete = complete and all(item == given[0] for item in given)
        sides[side] = given[0] if given else None
    merged: dict[str, Any] = {"name": "+".join(names)}
    rest = [
        {key: value for key, value in recipe.items() if key != "name" and key not in SIDES}
        for recipe in recipes
    ]
    if complete and all(item == rest[0] for item in rest):
        return {**rest[0], **sides, **merged}
    return {**merged, "parts": [dict(recipe) for recipe in recipes]}


def _merge_calibrations(manifests: Sequence[Manifest]) -> Mapping[str, Any]:
    used = [manifest.calibration for manifest in manifests if manifest.calibration]
    if all(calibration == used[0] for calibration in used):
        return used[0] if used else {}  # a recipe that needs no calibration records none
    return {"parts": [dict(manifest.calibration) for manifest in manifests]}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
