"""What LeRobot writes beside a policy's weights: features, processing steps, statistics.

A policy's folder has `config.json` and two pipelines, `policy_preprocessor.json` and
`policy_postprocessor.json`: lists of steps with a registry name, a configuration and, where the
step has a state, a safetensors file of tensors called `<feature>.<statistic>` (LeRobot 0.4.4,
processor/pipeline.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.files import read_json
from omega_qvla.policies.statistics import FIELDS, Stats

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"
_IMAGES = ("observation.images.", "observation.")


@dataclass(frozen=True)
class Step:
    """One step: its configuration, and statistics by feature (state and action only)."""

    config: Mapping[str, Any]
    stats: Mapping[str, Stats] = field(default_factory=dict)

    def stats_of(self, feature: str, where: Path) -> Stats:
        """Statistics of a feature. Raises CheckpointError: LeRobot would pass it on unscaled."""
        if feature not in self.stats:
            raise CheckpointError(
                f"{where} has no statistics of {feature}: the policy was saved without its "
                "dataset's; without them its numbers mean nothing"
            )
        return self.stats[feature]


def read_steps(file: Path) -> dict[str, Step]:
    """Registry name -> step, of one pipeline. Raises CheckpointError naming the file."""
    listed = read_json(file).get("steps")
    if not isinstance(listed, list) or not all(isinstance(step, dict) for step in listed):
        raise CheckpointError(f"{file} has no list of steps")
    steps = {}
    for entry in listed:
        name = str(entry.get("registry_name", entry.get("class", "")))
        state = entry.get("state_file")
        stats = {} if state is None else _read_stats(file.parent / str(state))
        steps[name] = Step(entry.get("config") or {}, stats)
    return steps


def find_step(steps: Mapping[str, Step], name: str, file: Path) -> Step:
    """The step called `name`. Raises CheckpointError."""
    if name not in steps:
        raise CheckpointError(
            f"{file} has no step {name!r} but {', '.join(steps) or 'none'}: another version of "
            "LeRobot wrote it"
        )
    return steps[name]


def _read_stats(file: Path) -> dict[str, Stats]:
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: not a complete checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    values: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        feature, _, statistic = key.rpartition(".")
        if feature in (STATE, ACTION) and statistic in FIELDS:
            flat = np.asarray(tensor, np.float64).reshape(-1)
            values.setdefault(feature, {})[statistic] = flat.tolist()
    return {name: Stats.from_dict(data, f"{file} {name}") for name, data in values.items()}


def width_of(config: Mapping[str, Any], feature: str, padded: int) -> int:
    """Channels of the state or action feature in config.json; `padded` where it is not listed.

    Raises:
        CheckpointError: config.json lists it with an impossible shape.
    """
    group = "output_features" if feature == ACTION else "input_features"
    entry = (config.get(group) or {}).get(feature)
    if entry is None:
        return padded
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int):
        raise CheckpointError(f"config.json: {feature} has the shape {shape!r}, not [channels]")
    return shape[0]


def cameras(config: Mapping[str, Any], steps: Mapping[str, Step]) -> dict[str, str | None]:
    """Image feature (without `observation.images.`) -> the robot's camera, in the file's order.

    A camera is called as its feature, or as the preprocessor renames it from; the features that
    LeRobot adds as `empty_camera_<i>` are never filled, and come last as LeRobot has them.
    """
    rename = steps["rename_observations_processor"].config.get("rename_map", {}) if (
        "rename_observations_processor" in steps
    ) else {}  # fmt: skip
    robots = {str(new): str(old) for old, new in rename.items()}
    found: dict[str, str | None] = {}
    for feature, entry in (config.get("input_features") or {}).items():
        if not isinstance(entry, dict) or entry.get("type") != "VISUAL":
            continue
        slot = _camera(feature)
        empty = slot.startswith("empty_camera_")
        found[slot] = None if empty else _camera(robots.get(feature, feature))
    if not any(found.values()):
        raise CheckpointError("config.json lists no camera among its input_features")
    filled = {slot: camera for slot, camera in found.items() if camera is not None}
    return {**filled, **dict.fromkeys(s for s, camera in found.items() if camera is None)}


def _camera(feature: str) -> str:
    for prefix in _IMAGES:
        if feature.startswith(prefix):
            return feature.removeprefix(prefix)
    return feature
