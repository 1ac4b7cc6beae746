"""Tiny policies written the way openpi, LeRobot and Isaac-GR00T write theirs, by hand.

Nothing here uses the package's own writer: names, files and numbers are those of the originals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import IMAGE_SLOTS, Pi05Config
from omega_qvla.policies.pi05.init import init_weights
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.statistics import compute_statistics
from omega_qvla.policies.tokenizer import build_pi05_tokenizer
from policies.tiny import CAMERAS, IMAGE_SIZE, PROMPTS, tiny_pi05

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
GROOT_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
GROOT_EMBED = "backbone.eagle_model.language_model.model.embed_tokens.weight"
BATCH = "observation.images."


def wide_pi05(seed: int = 0, state_dim: int = 32) -> Pi05Policy:
    """`tiny_pi05` with room for LeRobot's 32 numbers in the prompt, and so many state channels."""
    config = replace(tiny_pi05().model.config, max_token_len=64)
    model = Pi05Model(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("action_out_proj") or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    rng = np.random.default_rng(seed)
    state = compute_statistics(rng.normal(size=(256, state_dim)))
    actions = compute_statistics(rng.uniform(-1, 1, (256, 4)))
    processor = Pi05Processor.create(config, build_pi05_tokenizer(PROMPTS), state, actions, CAMERAS)
    return Pi05Policy(model.eval().requires_grad_(False), processor)


def observation(seed: int, state_dim: int, cameras: tuple[str, ...], edge: int = IMAGE_SIZE) -> Any:
    """Random images under these names, and a state."""
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for c in cameras}
    return Observation(images, rng.normal(size=state_dim).astype(np.float32), PROMPTS[0])


def dump(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def _tensors(module: torch.nn.Module, prefix: str, renamed: Mapping[str, str]) -> Any:
    state = module.state_dict()
    return {prefix + renamed.get(n, n): t.detach().clone() for n, t in state.items()}


def _sizes(config: Pi05Config) -> dict[str, Any]:
    data = config.to_dict()
    names = ("paligemma_variant", "action_expert_variant", "vision", "vocab_size")
    return {name: data[name] for name in names}


def write_openpi(policy: Pi05Policy, path: Path, asset: str = "our/robot") -> Path:
    """examples/convert_jax_model_to_pytorch.py: save_model, config.json, assets."""
    config = policy.model.config
    tensors = _tensors(policy.model, "", {EMBED: HEAD})
    tensors["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(3, 2)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt", EMBED: HEAD})
    sizes = {"action_dim": config.action_dim, "action_horizon": config.action_horizon}
    # max_token_len is ours: openpi has 200, far too many for a tiny model.
    extra = {"precision": "float32", "max_token_len": config.max_token_len}
    dump(path / "config.json", {**sizes, **_sizes(config), **extra})
    fields = ("mean", "std", "q01", "q99")
    stats = {name: stats.to_dict(fields) for name, stats in policy.processor.stats.items()}
    dump(path / "assets" / asset / "norm_stats.json", {"norm_stats": stats})
    policy.processor.tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_steps(path: Path, name: str, steps: list[tuple[str, dict[str, Any], Any]]) -> None:
    """A pipeline as LeRobot's processor/pipeline.py writes it; a step is (name, config, stats)."""
    entries = []
    for i, (registry, config, stats) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": registry, "config": config}
        if stats:
            entry["state_file"] = f"{name}_step_{i}_{registry}.safetensors"
            tensors = {
                f"{feature}.{field}": torch.tensor(values, dtype=torch.float32)
                for feature, fields in stats.items()
                for field, values in fields.items()
            }
            tensors[f"{BATCH}base.mean"] = torch.zeros(3, 1, 1)
            save_file(tensors, path / entry["state_file"])
        entries.append(entry)
    dump(path / f"{name}.json", {"name": name, "steps": entries})


def _features(state: int, action: int, cameras: tuple[str, ...]) -> dict[str, Any]:
    image = {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]}
    return {
        "input_features": {
            **{f"{BATCH}{camera}": image for camera in cameras},
            "observation.state": {"type": "STATE", "shape": [state]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [action]}},
    }


def write_lerobot_pi05(
    policy: Pi05Policy,
    path: Path,
    cameras: tuple[str, ...] = (*IMAGE_SLOTS[:2], "empty_camera_0"),
    norm: str = "QUANTILES",
) -> Path:
    """LeRobot's `pi05` policy folder: prefix, tied head, two pipelines."""
    config, processor = policy.model.config, policy.processor
    path.mkdir(parents=True)
    tensors = _tensors(policy.model, "model.", {EMBED: HEAD})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    features = _features(processor.config.state_dim, processor.config.action_dim, cameras)
    dump(
        path / "config.json",
        {
            "type": "pi05",
            "n_obs_steps": 1,
            "chunk_size": config.action_horizon,
            "n_action_steps": config.action_horizon,
            "max_state_dim": 32,
            "max_action_dim": config.action_dim,
            "num_inference_steps": config.num_inference_steps,
            "min_period": 4e-3,
            "max_period": 4.0,
            "image_resolution": [config.vision.image_size] * 2,
            "tokenizer_max_length": config.max_token_len,
            "dtype": "float32",
            "empty_cameras": 1,
            **_sizes(config),
            **features,
        },
    )
    stats = {
        "observation.state": processor.stats["state"].to_dict(),
        "action": processor.stats["actions"].to_dict(),
    }
    mapping = {"VISUAL": "IDENTITY", "STATE": norm, "ACTION": norm}
    settings = {"eps": 1e-8, "features": {}, "norm_map": mapping}
    before: list[tuple[str, dict[str, Any], Any]] = [
        ("rename_observations_processor", {"rename_map": {}}, None),
        ("to_batch_processor", {}, None),
        ("normalizer_processor", settings, stats),
        ("pi05_prepare_state_tokenizer_processor_step", {}, None),
        ("tokenizer_processor", {"tokenizer_name": "google/paligemma-3b-pt-224"}, None),
    ]
    write_steps(path, "policy_preprocessor", before)
    write_steps(path, "policy_postprocessor", [("unnormalizer_processor", settings, stats)])
    processor.tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_isaac(policy: GrootPolicy, path: Path, tag: str = "new_embodiment") -> Path:
    """Isaac-GR00T's folder: two shards with an index, experiment_cfg; head and embedding stored."""
    path.mkdir(parents=True)
    tensors = _tensors(policy.model, "", {})
    tensors[GROOT_HEAD] = tensors[GROOT_EMBED].clone()
    tensors["backbone.eagle_model.vision_model.vision_model.head.probe"] = torch.zeros(1, 1, 3)
    names, weight_map = sorted(tensors), {}
    for part in range(2):
        shard = f"model-0000{part + 1}-of-00002.safetensors"
        chosen = names[part::2]
        save_file({n: tensors[n] for n in chosen}, path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, shard)
    dump(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    dump(path / "config.json", policy.model.config.to_dict())
    statistics = {
        modality: {key: stats.to_dict() for key, stats in keys.items()}
        for modality, keys in policy.processor.stats.items()
    }
    video = {camera: {"resolution": [256, 256], "channels": 3, "fps": 20.0} for camera in CAMERAS}
    entry = {"statistics": statistics, "modalities": {"video": video}, "embodiment_tag": tag}
    dump(path / "experiment_cfg" / "metadata.json", {tag: entry})
    policy.processor.tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_lerobot_groot(policy: GrootPolicy, path: Path, base: Path) -> Path:
    """LeRobot's `groot` policy folder: prefix, head alone, sizes in the base model's config."""
    path.mkdir(parents=True)
    tensors = _tensors(policy.model, "_groot_model.", {GROOT_EMBED: GROOT_HEAD})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    head, processor = policy.model.config.action_head, policy.processor
    dump(base / "config.json", policy.model.config.to_dict())
    dump(
        path / "config.json",
        {
            "type": "groot",
            "base_model_path": str(base),
            "tokenizer_assets_repo": "lerobot/eagle2hg-processor-groot-n1p5",
            "embodiment_tag": "new_embodiment",
            "chunk_size": 50,
            "max_state_dim": head.max_state_dim,
            "max_action_dim": head.action_dim,
            "use_bf16": True,
            **_features(processor.state_dim, processor.action_dim, tuple(reversed(CAMERAS))),
        },
    )
    stats = {
        "observation.state": processor.stats["state"]["state"].to_dict(),
        "action": processor.stats["action"]["action"].to_dict(),
    }
    pack = {
        "embodiment_tag": "new_embodiment",
        "embodiment_mapping": {"new_embodiment": processor.config.embodiment_id},
        "normalize_min_max": True,
        "formalize_language": False,
    }
    write_steps(path, "policy_preprocessor", [("groot_pack_inputs_v3", pack, stats)])
    unpack = {"env_action_dim": processor.action_dim, "normalize_min_max": True}
    step = ("groot_action_unpack_unnormalize_v1", unpack, stats)
    write_steps(path, "policy_postprocessor", [step])
    processor.tokenizer.save(str(path / "tokenizer.json"))
    return path
