from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omega_qvla.errors import CheckpointError, ConfigError
from omega_qvla.policies.base import Policy
from omega_qvla.policies.outliers import add_outliers
from omega_qvla.policies.registry import load_policy, save_policy, source_hashes
from policies.tiny import TINY, tiny_observation

PI05_LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
PI05_EMBED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
GROOT_EMBED = "backbone.eagle_model.language_model.model.embed_tokens.weight"
GROOT_LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(params=list(TINY))
def policy(request: pytest.FixtureRequest) -> Policy:
    built: Policy = TINY[request.param]()
    return built


def edit(path: Path, change: Edit) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_round_trip_in_float32_is_exact(policy: Policy, tmp_path: Path) -> None:
    loaded = load_policy(save_policy(policy, tmp_path / "p", torch.float32))
    assert type(loaded) is type(policy)
    assert loaded.cameras == policy.cameras
    observation = tiny_observation()
    np.testing.assert_array_equal(loaded.infer(observation), policy.infer(observation))
    assert not list((tmp_path / "p").rglob("*.tmp"))


def test_round_trip_in_bfloat16(policy: Policy, tmp_path: Path) -> None:
    once = load_policy(save_policy(policy, tmp_path / "p"))
    twice = load_policy(save_policy(once, tmp_path / "q"))
    observation = tiny_observation()
    np.testing.assert_array_equal(once.infer(observation), twice.infer(observation))
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in "pq")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    narrow = load_policy(tmp_path / "p", dtype=torch.bfloat16)
    assert narrow.module.state_dict().keys() == policy.module.state_dict().keys()
    difference = np.abs(narrow.infer(observation) - once.infer(observation)).max()
    assert 0 < difference < 0.2


def test_the_layout_is_the_original_one(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    with safe_open(path / "model.safetensors", "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    config = json.loads((path / "config.json").read_text())
    common = {"config.json", "model.safetensors", "processor.json", "tokenizer.json"}
    if policy.family == "pi05":
        assert names == common | {"assets/demo/norm_stats.json"}
        assert PI05_LM_HEAD in keys
        assert PI05_EMBED not in keys
        assert metadata[PI05_EMBED] == PI05_LM_HEAD
        assert config["precision"] == "bfloat16"
        stats = json.loads((path / "assets/demo/norm_stats.json").read_text())["norm_stats"]
        assert {k: set(v) for k, v in stats.items()} == {
            k: {"mean", "std", "q01", "q99"} for k in ("state", "actions")
        }
    else:
        assert names == common | {"experiment_cfg/metadata.json"}
        assert GROOT_EMBED in keys
        assert (config["model_type"], config["torch_dtype"]) == ("gr00t_n1_5", "bfloat16")
        metadata = json.loads((path / "experiment_cfg/metadata.json").read_text())
        entry = metadata["new_embodiment"]
        assert set(entry) == {"statistics", "modalities", "embodiment_tag"}
        assert set(entry["statistics"]["action"]["action"]) >= {"min", "max", "q01", "q99"}


def test_tied_embeddings_are_accepted_under_either_name(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    expected = load_policy(path).infer(tiny_observation())
    head, embed = (
        (PI05_LM_HEAD, PI05_EMBED) if policy.family == "pi05" else (GROOT_LM_HEAD, GROOT_EMBED)
    )

    def both(tensors: dict[str, torch.Tensor]) -> None:
        value = tensors.get(head, tensors.get(embed))
        assert value is not None
        tensors |= {head: value, embed: value.clone()}

    edit(path, both)
    np.testing.assert_array_equal(load_policy(path).infer(tiny_observation()), expected)
    for dropped, kept in ((head, embed), (embed, head)):

        def only(
            tensors: dict[str, torch.Tensor], dropped: str = dropped, kept: str = kept
        ) -> None:
            tensors[kept] = tensors.pop(dropped)

        edit(path, only)
        np.testing.assert_array_equal(load_policy(path).infer(tiny_observation()), expected)
    edit(path, lambda t: t.update({embed: t[head] + 1}))
    with pytest.raises(CheckpointError, match="tied but differ"):
        load_policy(path)


def test_tensors_that_the_original_carries_unused_are_ignored(
    policy: Policy, tmp_path: Path
) -> None:
    path = save_policy(policy, tmp_path)
    extra = {
        "pi05": "paligemma_with_expert.gemma_expert.lm_head.weight",
        "groot_n15": "backbone.eagle_model.vision_model.vision_model.head.probe",
    }[policy.family]
    edit(path, lambda t: t.update({extra: torch.zeros(3)}))
    load_policy(path)


def _reshape_first(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name] = tensors[name].T[:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"stranger.weight": torch.zeros(1)}), "unknown stranger.weight"),
        (
            lambda t: t.pop(next(n for n in t if n.endswith("down_proj.weight"))),
            r"missing .*down_proj\.weight",
        ),
        (_reshape_first, "has shape"),
        (lambda t: t.clear() or t.update({"a": torch.zeros(1)}), "neither a pi0.5"),
    ],
)
def test_strange_weights_are_refused(
    policy: Policy, tmp_path: Path, change: Edit, message: str
) -> None:
    path = save_policy(policy, tmp_path)
    edit(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_policy(path)


def test_broken_and_missing_files_are_named(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        load_policy(tmp_path / "nowhere")
    whole = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for file, content in whole.items():
        file.unlink()
        if file.name != "processor.json":  # without it, the layout says how to process
            with pytest.raises(CheckpointError, match=file.name):
                load_policy(path)
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=file.name):
            load_policy(path)
        file.write_bytes(content)
    load_policy(path)


def test_unknown_settings_are_refused(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    file = path / "processor.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"colour": 1}))
    with pytest.raises(CheckpointError, match="unknown key colour"):
        load_policy(path)
    settings.pop("cameras")
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="missing cameras"):
        load_policy(path)


def test_the_config_of_the_other_family_is_refused(tmp_path: Path) -> None:
    pi05 = save_policy(TINY["pi05"](), tmp_path / "pi05")
    groot = save_policy(TINY["groot_n15"](), tmp_path / "groot")
    ours, theirs = pi05 / "config.json", groot / "config.json"
    first, second = ours.read_text(), theirs.read_text()
    ours.write_text(second)
    theirs.write_text(first)
    for path in (pi05, groot):
        with pytest.raises(ConfigError):
            load_policy(path)


def test_sharded_weights_are_read(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    expected = load_policy(path).infer(tiny_observation())
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        shard = f"model-0000{part + 1}-of-00002.safetensors"
        names = sorted(tensors)[part::2]
        save_file({name: tensors[name] for name in names}, path / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    np.testing.assert_array_equal(load_policy(path).infer(tiny_observation()), expected)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of"):
        load_policy(path)


def test_source_hashes_tell_checkpoints_apart(policy: Policy, tmp_path: Path) -> None:
    path = save_policy(policy, tmp_path)
    wide, narrow = load_policy(path), load_policy(path, dtype=torch.bfloat16)
    hashes = source_hashes(wide)
    assert hashes == source_hashes(narrow)
    assert set(hashes) == set(policy.module.state_dict())
    other = source_hashes(TINY[policy.family](seed=5))
    assert any(hashes[name] != other[name] for name in hashes)
    touched = {name for site in add_outliers(wide) for name in site.consumers}
    changed = {name for name, value in source_hashes(wide).items() if value != hashes[name]}
    assert {f"{name}.weight" for name in touched} <= changed


def test_a_quantized_policy_is_not_saved(policy: Policy, tmp_path: Path) -> None:
    name = next(n for n, m in policy.module.named_modules() if n.endswith("q_proj"))
    parent, _, leaf = name.rpartition(".")
    setattr(policy.module.get_submodule(parent), leaf, torch.nn.Identity())
    with pytest.raises(CheckpointError, match="quantized"):
        save_policy(policy, tmp_path / "p")
    assert not (tmp_path / "p").exists()
