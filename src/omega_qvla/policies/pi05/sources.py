"""pi0.5 checkpoints as openpi and LeRobot write them: configuration, processing, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.policies import lerobot
from omega_qvla.policies.files import options, read_json
from omega_qvla.policies.pi05.config import IMAGE_SLOTS, Pi05Config
from omega_qvla.policies.pi05.processor import Pi05Options, Pi05Processor, read_norm_stats
from omega_qvla.policies.statistics import Stats
from omega_qvla.policies.tokenizer_files import read_tokenizer

#: LeRobot's step pads the state to this length whatever config.json says: the step is saved
#: without its configuration (0.4.4, processor_pi05.py).
_PROMPT_STATE_DIM = 32
_PERIODS = {"min_period": 4e-3, "max_period": 4.0}

#: asset_id -> what openpi's training configuration of that robot says (training/config.py,
#: policies/{libero,droid}_policy.py); the checkpoint itself does not name the cameras.
_ROBOTS: Mapping[str, Mapping[str, Any]] = {
    "physical-intelligence/libero": {
        "cameras": dict(zip(IMAGE_SLOTS, ("image", "wrist_image", None), strict=True)),
        "discrete_state_input": False,
    },
    "droid": {
        "cameras": dict(
            zip(IMAGE_SLOTS, ("exterior_image_1_left", "wrist_image_left", None), strict=True)
        ),
    },
}


def read_pi05(
    folder: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
) -> tuple[Pi05Config, Pi05Processor]:
    """Everything but the weights.

    `processor.json`, where there is one, says how to process; otherwise the layout does.

    Args:
        folder: the checkpoint.
        data: its config.json.
        settings: fields of `Pi05Options` that go before both.
        tokenizer: file or folder, where the checkpoint has none.

    Raises:
        CheckpointError: a file is missing or broken, or an unknown setting.
        ConfigError: config.json asks for something that is not implemented.
    """
    derive = _from_lerobot if data.get("type") == "pi05" else _from_openpi
    model, found, stats = derive(folder, data, dict(settings or {}))
    config = options(Pi05Options, {**found, **(settings or {})}, "processing of the checkpoint")
    return model, Pi05Processor(config, model, read_tokenizer(folder, tokenizer), stats)


_Derived = tuple[Pi05Config, dict[str, Any], dict[str, Stats]]


def _own_options(folder: Path) -> dict[str, Any] | None:
    file = folder / "processor.json"
    return read_json(file) if file.is_file() else None


def _from_openpi(folder: Path, data: Mapping[str, Any], settings: Mapping[str, Any]) -> _Derived:
    model = Pi05Config.from_dict(data)
    own = _own_options(folder)
    if own is not None:
        # Refuse a broken file as such, not as what it becomes with the settings.
        asset = options(Pi05Options, own, "processor.json").asset_id
        asset = settings.get("asset_id", asset)
        return model, own, read_norm_stats(folder, asset)
    asset = settings.get("asset_id") or _only_asset(folder)
    stats = read_norm_stats(folder, asset)
    found: dict[str, Any] = {
        "cameras": {slot: slot for slot in model.image_slots},
        "state_dim": _width(stats, "state"),
        "action_dim": _width(stats, "actions"),
        "resize": True,
        "asset_id": asset,
    }
    return model, found | dict(_ROBOTS.get(asset, {})), stats


def _only_asset(folder: Path) -> str:
    assets = folder / "assets"
    found = [f.parent.relative_to(assets).as_posix() for f in assets.rglob("norm_stats.json")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{assets} has statistics of {', '.join(sorted(found))}: say which "
            "(setting `asset_id`, --settings)"
        )
    raise CheckpointError(
        f"{assets} has no norm_stats.json: the statistics are missing, without them the policy's "
        "numbers mean nothing; copy the training run's assets there"
    )


def _width(stats: Mapping[str, Stats], name: str) -> int:
    if name not in stats:
        raise CheckpointError(f"norm_stats.json lacks {name}")
    return len(stats[name].take(f"norm_stats {name}", "q01")[0])


def _from_lerobot(folder: Path, data: Mapping[str, Any], settings: Mapping[str, Any]) -> _Derived:
    before, after = folder / lerobot.PREPROCESSOR, folder / lerobot.POSTPROCESSOR
    steps, undo = lerobot.read_steps(before), lerobot.read_steps(after)
    normalize = lerobot.find_step(steps, "normalizer_processor", before)
    unnormalize = lerobot.find_step(undo, "unnormalizer_processor", after)
    cameras = lerobot.cameras(data, steps)
    model = lerobot_config(data, tuple(cameras))
    prepare = steps.get("pi05_prepare_state_tokenizer_processor_step", lerobot.Step({}))
    modes = [
        str((step.config.get("norm_map") or {}).get(kind, "IDENTITY")).lower()
        for step, kind in ((normalize, "STATE"), (unnormalize, "ACTION"))
    ]
    state = Stats() if modes[0] == "identity" else normalize.stats_of(lerobot.STATE, before)
    actions = Stats() if modes[1] == "identity" else unnormalize.stats_of(lerobot.ACTION, after)
    found = {
        "cameras": cameras,
        "state_dim": lerobot.width_of(data, lerobot.STATE, data.get("max_state_dim", 32)),
        "action_dim": lerobot.width_of(data, lerobot.ACTION, model.action_dim),
        "resize": True,
        "asset_id": "lerobot",
        "dialect": "lerobot",
        "prompt_state_dim": prepare.config.get("max_state_dim", _PROMPT_STATE_DIM),
        "border": -3.0,
        "state_mode": modes[0],
        "action_mode": modes[1],
        "epsilon": normalize.config.get("eps", 1e-8),
    }
    return model, found | (_own_options(folder) or {}), {"state": state, "actions": actions}


def lerobot_config(data: Mapping[str, Any], slots: tuple[str, ...]) -> Pi05Config:
    """The network of a LeRobot `pi05` config.json; `slots` are its image features, in order.

    Raises:
        ConfigError: a key is missing, or a value is not implemented.
    """
    for name, value in _PERIODS.items():
        if data.get(name, value) != value:
            raise ConfigError(f"{name} {data[name]}; only {value} is implemented")
    try:
        sizes = {
            "action_dim": data["max_action_dim"],
            "action_horizon": data["chunk_size"],
            "paligemma_variant": data["paligemma_variant"],
            "action_expert_variant": data["action_expert_variant"],
            "max_token_len": data.get("tokenizer_max_length", 200),
            "num_inference_steps": data.get("num_inference_steps", 10),
            "precision": data.get("dtype", "float32"),
            "image_slots": list(slots),
            "time_grid": "exact",
        }
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from None
    # Sizes that LeRobot fixes; files of other sizes carry them as openpi's do.
    small = {key: data[key] for key in ("vision", "vocab_size") if key in data}
    model = Pi05Config.from_dict({**sizes, **small})
    edge = model.vision.image_size
    if list(data.get("image_resolution", [edge, edge])) != [edge, edge]:
        raise ConfigError(
            f"image_resolution {data['image_resolution']}; the vision tower takes {edge} x {edge}"
        )
    return model
