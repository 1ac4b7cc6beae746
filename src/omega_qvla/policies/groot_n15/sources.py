"""GR00T N1.5 checkpoints as Isaac-GR00T and LeRobot write them: configuration, processing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.policies import hub, lerobot
from omega_qvla.policies.files import options, read_json
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.processor import (
    GrootOptions,
    GrootProcessor,
    metadata_stats,
    read_metadata,
)
from omega_qvla.policies.statistics import Stats
from omega_qvla.policies.tokenizer_files import read_tokenizer

#: The release whose config.json `GrootConfig()` is.
PUBLISHED = "nvidia/GR00T-N1.5-3B"

#: Embodiment tag -> row of the per-embodiment weights (Isaac-GR00T data/embodiment_tags.py).
EMBODIMENTS: Mapping[str, int] = {
    "new_embodiment": 31,
    "oxe_droid": 17,
    "agibot_genie1": 26,
    "gr1": 24,
}

#: Centre crop of the evaluation transforms in Isaac-GR00T's data configurations.
_CROP = 0.95

_PACK, _UNPACK = "groot_pack_inputs_v3", "groot_action_unpack_unnormalize_v1"


def read_groot(
    folder: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    *,
    offline: bool = False,
    cache: Path | None = None,
) -> tuple[GrootConfig, GrootProcessor]:
    """Everything but the weights.

    `processor.json`, where there is one, says how to process; otherwise the layout does.

    Args:
        folder: the checkpoint.
        data: its config.json.
        settings: fields of `GrootOptions` that go before both.
        tokenizer: file or folder, where the checkpoint has none.
        offline, cache: see `hub.locate`; LeRobot's files name their base model.

    Raises:
        CheckpointError: a file is missing or broken, or an unknown setting.
        ConfigError: config.json asks for something that is not implemented.
    """
    chosen = dict(settings or {})
    if data.get("type") == "groot":
        model = base_config(folder, data, offline, cache)
        found, stats = _from_lerobot(folder, data, model)
    else:
        model = GrootConfig.from_dict(data)
        found, stats = _from_isaac(folder, chosen)
    config = options(GrootOptions, {**found, **chosen}, "processing of the checkpoint")
    return model, GrootProcessor(config, model, read_tokenizer(folder, tokenizer), stats)


_Derived = tuple[dict[str, Any], dict[str, dict[str, Stats]]]


def _own_options(folder: Path) -> dict[str, Any] | None:
    file = folder / "processor.json"
    return read_json(file) if file.is_file() else None


def _from_isaac(folder: Path, settings: Mapping[str, Any]) -> _Derived:
    own = _own_options(folder)
    if own is not None:
        tag = options(GrootOptions, own, "processor.json").embodiment_tag
        entry = read_metadata(folder, settings.get("embodiment_tag", tag))
        return own, metadata_stats(folder, entry)
    tag = settings.get("embodiment_tag") or _only_tag(folder)
    if tag not in EMBODIMENTS and "embodiment_id" not in settings:
        raise CheckpointError(
            f"embodiment {tag!r} is not one of {', '.join(EMBODIMENTS)}: say which row of the "
            "per-embodiment weights it has (setting `embodiment_id`, --settings)"
        )
    entry = read_metadata(folder, tag)
    stats = metadata_stats(folder, entry)
    found = {
        "cameras": tuple((entry.get("modalities") or {}).get("video") or {}),
        "state_keys": tuple(stats["state"]),
        "action_keys": tuple(stats["action"]),
        "embodiment_tag": tag,
        "embodiment_id": EMBODIMENTS.get(tag, 0),
        "resize": True,
        "crop": _CROP,
    }
    if not found["cameras"] and "cameras" not in settings:
        raise CheckpointError(
            f"metadata.json lists no video of {tag}: say which cameras it has (setting `cameras`, "
            "--settings)"
        )
    return found, stats


def _only_tag(folder: Path) -> str:
    tags = list(read_json(folder / "experiment_cfg" / "metadata.json"))
    if len(tags) != 1:
        raise CheckpointError(
            f"metadata.json has the embodiments {', '.join(tags) or 'none'}: say which one the "
            "robot is (setting `embodiment_tag`, --settings)"
        )
    return tags[0]


def _from_lerobot(folder: Path, data: Mapping[str, Any], model: GrootConfig) -> _Derived:
    before, after = folder / lerobot.PREPROCESSOR, folder / lerobot.POSTPROCESSOR
    steps, undo = lerobot.read_steps(before), lerobot.read_steps(after)
    pack, unpack = lerobot.find_step(steps, _PACK, before), lerobot.find_step(undo, _UNPACK, after)
    for step, name in ((pack, _PACK), (unpack, _UNPACK)):
        if not step.config.get("normalize_min_max", True):
            raise CheckpointError(f"{name}: normalize_min_max is off; only min_max is implemented")
    if pack.config.get("formalize_language"):
        raise CheckpointError(f"{_PACK}: formalize_language is not implemented")
    tag = str(pack.config.get("embodiment_tag", data.get("embodiment_tag", "new_embodiment")))
    mapping = pack.config.get("embodiment_mapping") or EMBODIMENTS
    cameras = [camera for camera in lerobot.cameras(data, steps).values() if camera is not None]
    found = {
        "cameras": tuple(sorted(cameras)),
        "embodiment_tag": tag,
        "embodiment_id": mapping.get(tag, 0),
        "resize": True,
        "dialect": "lerobot",
    }
    sizes = {
        "max_state_dim": (data.get("max_state_dim"), model.action_head.max_state_dim),
        "max_action_dim": (data.get("max_action_dim"), model.action_head.action_dim),
    }
    for name, (have, want) in sizes.items():
        if have not in (None, want):
            raise ConfigError(f"config.json: {name} {have}, its base model has {want}")
    stats = {
        "state": {"state": pack.stats_of(lerobot.STATE, before)},
        "action": {"action": unpack.stats_of(lerobot.ACTION, after)},
    }
    return found | (_own_options(folder) or {}), stats


def base_config(
    folder: Path, data: Mapping[str, Any], offline: bool = False, cache: Path | None = None
) -> GrootConfig:
    """The network of a LeRobot `groot` config.json: that of its `base_model_path`.

    The path is a folder (relative ones also beside the checkpoint) or on the Hub; the published
    model's sizes are known here.

    Raises:
        CheckpointError: the base model's config.json cannot be had.
        ConfigError: it is another network.
    """
    base = str(data.get("base_model_path") or PUBLISHED)
    if "n1.7" in base.lower() or "n1.6" in base.lower():
        raise ConfigError(f"base_model_path {base}: only GR00T N1.5 is implemented")
    for place in (Path(base), folder / base):
        if (place / "config.json").is_file():
            return GrootConfig.from_dict(read_json(place / "config.json"))
    if base == PUBLISHED:
        return GrootConfig()
    if not hub.is_repository(base):
        raise CheckpointError(
            f"base_model_path {base} has no config.json here, and the checkpoint's own does not "
            "hold the sizes of the network: put the base model's there"
        )
    file = hub.locate_file(base, "config.json", offline=offline, cache=cache)
    return GrootConfig.from_dict(read_json(file))
