"""The published file format: read without running code, converted, or refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.config import ActivationScheme
from omega_qvla.errors import PackError
from omega_qvla.kernels.reference import linear as reference_linear
from omega_qvla.modules.step_context import Step
from omega_qvla.pack.apply import apply_pack
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.upstream import convert_published, read_published
from omega_qvla.pack.verify import verify_pack
from omega_qvla.policies.base import Policy
from pack.published import HEAD, STEPS, head_record, linears, published_content, write_published
from policies.tiny import tiny_groot, tiny_observation, tiny_pi05

DYNAMIC = ActivationScheme("per_token", bits=8)


def policies() -> dict[str, Policy]:
    return {"pi05": tiny_pi05(num_steps=STEPS), "groot_n15": tiny_groot(num_steps=STEPS)}


@pytest.fixture(scope="module", params=["pi05", "groot_n15"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(policy, the published content, the converted pack)."""
    policy = policies()[request.param]
    content = published_content(policy, rank=2)
    folder = tmp_path_factory.mktemp("published")
    truth = {name: record.pop("q_truth") for name, record in _records(content).items()}
    source = write_published(content, folder / "quantized.pt")
    convert_published(source, policy, folder / "p.safetensors", activation=DYNAMIC)
    return policy, content, truth, read_pack(folder / "p.safetensors")


def _records(content: dict[str, Any]) -> dict[str, Any]:
    return {name: record for name, record in content.items() if name != "__meta__"}


def test_every_integer_comes_back(made: Any) -> None:
    _, content, truth, pack = made
    assert set(pack.layers) == set(_records(content))
    for name, layer in pack.layers.items():
        assert torch.equal(layer.integers(), truth[name].to(torch.int8)), name


def test_layers_compute_what_the_published_runtime_does(made: Any) -> None:
    """y = (fq(x R) Wq' + (x R B) A') R_out + bias, with the file's own tensors."""
    policy, content, _, pack = made
    for name in linears(policy, HEAD):
        layer, record = pack.layers[name], content[name]
        x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1)).double()
        step = None if layer.num_steps is None else Step(1, STEPS)
        table = record["act_scale_table"].double()
        scale = table.mean(0) if step is None else table[step.index]
        rotated = x @ record["duquant_rotation"].double()
        rounded = (rotated / scale.float()).round().clamp(-8, 7) * scale.float()
        y = rounded @ record["weight_res_q"].double().T
        y += rotated @ record["lowrank_B"].double() @ record["lowrank_A"].double().T
        y = y @ record["duquant_rotation_out"].double()
        bias = policy.module.get_submodule(name).bias
        y = y if bias is None else y + bias.double()
        ours = reference_linear(x.float(), layer, step).double()
        # A rounding tie may fall to either side; scales are those of 16 bits.
        assert (ours - y).norm() < 2e-3 * y.norm(), name


def test_the_pack_proves_itself_and_acts(made: Any, tmp_path: Path) -> None:
    policy, _, _, pack = made
    checks = verify_pack(pack.path, policy)
    assert all(check.passed for check in checks)
    fresh = policies()[policy.family]
    expected = fresh.infer(tiny_observation(), seed=3)
    report = apply_pack(fresh, pack)
    actions = fresh.infer(tiny_observation(), seed=3)
    assert report.layers == len(pack.layers)
    assert np.isfinite(actions).all() and not np.array_equal(actions, expected)


def test_where_it_comes_from_is_recorded(made: Any) -> None:
    _, content, _, pack = made
    origin = pack.manifest.calibration
    assert origin["source"] == "published pack" and origin["file"] == "quantized.pt"
    assert origin["meta"] == content["__meta__"]
    assert pack.manifest.recipe["name"] == "published"
    assert pack.manifest.num_steps == STEPS


def one(policy: Policy, **changes: Any) -> tuple[str, dict[str, Any]]:
    """A file of one action-head layer that runs in the steps, with `changes` to its record."""
    outside = set(policy.step_independent_linears())
    name, layer = next((n, m) for n, m in linears(policy, HEAD).items() if n not in outside)
    record = {**head_record(layer.weight, 0, blocks=False), **changes}
    return name, {name: {key: value for key, value in record.items() if value is not None}}


def refused(policy: Policy, content: Any, folder: Path, match: str) -> None:
    source = write_published(content, folder / "quantized.pt")
    with pytest.raises(PackError, match=match):
        convert_published(source, policy, folder / "p.safetensors")
    assert not (folder / "p.safetensors").exists()


def test_off_grid_weights_are_refused(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    name, content = one(policy)
    weight = content[name]["weight_res_q"]
    weight[3, 5] = weight[3].abs().max() * 0.55
    refused(policy, content, tmp_path, f"{name}: its integers cannot be recovered.*row 3")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_res_q": None}, "none of weight_res_q, baseline_q"),
        ({"smooth_scale": torch.full((8,), 2.0)}, "smooth_scale"),
        (
            {"format": "other", "lowrank_A": torch.ones(8, 1), "lowrank_B": torch.ones(8, 1)},
            "other",
        ),
        ({"act_scale_table": torch.zeros(STEPS, 3)}, "act_scale_table is not"),
        ({"act_scale_table": None}, "no activation scales.*per_token"),
        ({"a_bits": 5}, "activation.bits"),
        ({"weight_bits": 8}, "weight.bits|grid"),
        ({"duquant_rotation": torch.eye(3)}, "duquant_rotation is"),
        ({"weight_bits": "four"}, "malformed record"),
        ({"smooth_scale": "none"}, "malformed record"),
        ({"gptq_block_size": 0}, "malformed record"),
    ],
)
def test_what_cannot_be_recovered_is_named(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    name, content = one(policy, **change)
    refused(policy, content, tmp_path, f"{name}.*{match}")


def test_a_rotation_without_blocks_is_refused(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    name, content = one(policy)
    width = content[name]["duquant_rotation"].shape[0]
    full = torch.linalg.qr(torch.randn(width, width)).Q
    if width <= 512:  # one block spans it: then it is fine, as a block; mix rows across two
        full[0] = 0
    content[name]["duquant_rotation"] = full.to(torch.float16)
    refused(policy, content, tmp_path, f"{name}: duquant_rotation is not block-diagonal")


def test_a_step_never_calibrated_is_named(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    name, content = one(policy)
    content[name]["act_scale_table"][2] = 0
    refused(policy, content, tmp_path, f"{name}: denoising step.s. 2 were never calibrated")


def test_another_checkpoint_is_noticed_by_its_weights(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    name, _content = one(policy)
    record = head_record(torch.randn_like(policy.module.get_submodule(name).weight), 0, False)
    refused(policy, {name: record}, tmp_path, f"{name}: its weight is not the checkpoint's")


def test_a_layer_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    _, content = one(policy)
    refused(policy, {"nowhere.q_proj": next(iter(content.values()))}, tmp_path, "nowhere.q_proj")


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    zipped, bare = tmp_path / "quantized.pt", tmp_path / "bare.pt"
    torch.save({"layer": {"baseline_q": Trap(marker)}}, zipped)
    bare.write_bytes(pickle.dumps({"layer": {"baseline_q": Trap(marker)}}))
    for path in (zipped, bare):
        with pytest.raises(PackError, match=r"refused: .*could run code"):
            read_published(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"__meta__": {}}, {"a": 3}, {1: {"x": 1}}])
def test_other_content_is_refused(content: Any, tmp_path: Path) -> None:
    path = write_published(content, tmp_path / "quantized.pt")
    with pytest.raises(PackError, match="not a published pack"):
        read_published(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    _, content = one(tiny_pi05(num_steps=STEPS))
    whole = write_published(content, tmp_path / "quantized.pt").read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(PackError, match=r"cut\.pt"):
            read_published(tmp_path / "cut.pt")
    with pytest.raises(PackError, match="no such file"):
        read_published(tmp_path / "none.pt")


def test_static_scales_need_a_table(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=STEPS)
    source = write_published(one(policy)[1], tmp_path / "quantized.pt")
    static = ActivationScheme("per_step_channel")
    with pytest.raises(PackError, match="needs a table"):
        convert_published(source, policy, tmp_path / "p", activation=static)
