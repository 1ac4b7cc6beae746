"""A pack in the policy it was made from; refused by every other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.helpers import tiny_samples
from omega_qvla.config import ActivationScheme, Recipe, Scheme, SideRecipe, preset
from omega_qvla.errors import BackendError, PackError
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.pack import apply_pack, read_pack, verify_pack, write_pack
from omega_qvla.pack.verify import NMSE_LIMIT
from omega_qvla.quantize import quantize_policy
from pack.layers import make_layer, make_manifest
from policies.tiny import TINY, tiny_groot, tiny_observation, tiny_pi05


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pack") / "rtn.pack"
    return quantize_policy(tiny_pi05(), preset("rtn"), None, out=out)


def test_applied_policy_runs_quantized(pack: Path) -> None:
    policy, observation = tiny_pi05(), tiny_observation()
    before = policy.infer(observation)
    report = apply_pack(policy, pack)
    assert report.layers == 23
    linears = [m for m in policy.module.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == 23
    assert {linear.backend for linear in linears} == {report.backend}
    sizes = read_pack(pack).sizes()
    assert (report.layer_bytes, report.layer_bytes_16bit) == (
        sizes.layer_bytes,
        sizes.layer_bytes_16bit,
    )
    after = policy.infer(observation)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-4


def test_pack_of_another_checkpoint_names_the_tensors(pack: Path) -> None:
    policy = tiny_pi05()
    name = "action_in_proj.weight"
    with torch.no_grad():
        policy.module.get_parameter(name)[0, 0] += 1.0
    with pytest.raises(PackError, match=rf"another checkpoint: 1 of \d+ tensors differ: {name};"):
        apply_pack(policy, pack)
    assert not any(isinstance(module, QuantLinear) for module in policy.module.modules())
    with pytest.raises(PackError, match=r"differ: .*, \.\.\.;"):
        apply_pack(tiny_pi05(seed=9), pack)


def test_pack_of_another_family(pack: Path) -> None:
    with pytest.raises(PackError, match="pi05 policy, the checkpoint is groot_n15"):
        apply_pack(tiny_groot(), pack)


def test_twice(pack: Path) -> None:
    policy = tiny_pi05()
    apply_pack(policy, pack)
    with pytest.raises(PackError, match="already has quantized layers"):
        apply_pack(policy, pack)


def test_unknown_backend(pack: Path) -> None:
    policy = tiny_pi05()
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        apply_pack(policy, pack, backend="abacus")
    policy.infer(tiny_observation())


def test_static_tables_bind_the_step_count(tmp_path: Path) -> None:
    static = Scheme(activation=ActivationScheme("per_step_tensor"))
    recipe = Recipe("static", None, SideRecipe(static))
    out = quantize_policy(tiny_pi05(num_steps=4), recipe, tiny_samples(1), out=tmp_path / "p")
    apply_pack(tiny_pi05(num_steps=4), out)
    with pytest.raises(PackError, match="calibrated for 4 denoising steps, the policy runs 10"):
        apply_pack(tiny_pi05(), out)


def test_verify_gives_a_table(pack: Path) -> None:
    alone, against = verify_pack(pack), verify_pack(pack, tiny_pi05())
    assert all(check.passed for check in against)
    assert {check.what for check in alone} == {"integrity", "size", "integers", "tensors"}
    errors = {c.layer: c.value for c in against if c.what == "weight"}
    assert len(errors) == 23
    assert all(value is not None and 0.002 < value < 0.05 for value in errors.values())
    ratio = next(check.value for check in against if check.what == "size")
    assert ratio == read_pack(pack).sizes().ratio


def test_verify_against_another_checkpoint(pack: Path) -> None:
    with pytest.raises(PackError, match="source: this pack was made from another checkpoint"):
        verify_pack(pack, tiny_pi05(seed=9))
    table = verify_pack(pack, tiny_pi05(seed=9), strict=False)
    weights = [check for check in table if check.what == "weight"]
    # Unrelated weights: the error is the sum of both energies.
    assert not any(check.passed for check in weights)
    assert min(check.value or 0.0 for check in weights) > 2 * NMSE_LIMIT


def test_verify_names_a_layer_exchanged_for_another(pack: Path, tmp_path: Path) -> None:
    """Right hashes, wrong content: only the comparison with the weights can tell."""
    read = read_pack(pack)
    layers = dict(read.layers)
    one, two = (
        next(n for n in layers if f"layers.{i}.mlp.up" in n and "expert" in n) for i in (0, 1)
    )
    layers[one] = dataclasses.replace(layers[two], name=one)
    write_pack(tmp_path / "forged", read.manifest, layers)
    with pytest.raises(PackError, match=rf"1 of \d+ checks failed; layer {one}: weight: NMSE"):
        verify_pack(tmp_path / "forged", tiny_pi05())


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("rotation", lambda t: t.mul_(1.1), "rotation is not orthogonal"),
        ("output_rotation", lambda t: t[0].zero_(), "output_rotation is not orthogonal"),
    ],
)
def test_verify_sees_impossible_tensors(
    tmp_path: Path, field: str, change: object, message: str
) -> None:
    layer = make_layer("n", "everything")
    write_pack(tmp_path / "good", make_manifest(), {"n": layer})
    assert all(check.passed for check in verify_pack(tmp_path / "good"))
    change(getattr(layer, field))  # type: ignore[operator]
    write_pack(tmp_path / "bad", make_manifest(), {"n": layer})
    with pytest.raises(PackError, match=message):
        verify_pack(tmp_path / "bad")


@pytest.mark.parametrize("field", ["weight_scale", "smooth", "act_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_never_read(tmp_path: Path, field: str, value: float) -> None:
    layer = make_layer("n", "everything")
    getattr(layer, field).view(-1)[0] = value
    write_pack(tmp_path / "bad", make_manifest(), {"n": layer})
    with pytest.raises(PackError, match=f"layer n.*{field} is not finite and positive"):
        read_pack(tmp_path / "bad")


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("everything", "permutation", 3, "permutation is none"),
        ("everything", "permutation", 1_000_000, "permutation is none"),
        ("everything", "lowrank_a", float("inf"), "lowrank_a is not finite"),
        ("everything", "rotation", float("nan"), "rotation is not finite"),
        ("plain", "bias", float("nan"), "bias is not finite"),
        ("randomized", "signs", 0, r"signs are not \+-1"),
    ],
)
def test_values_that_would_spoil_every_result_are_never_read(
    tmp_path: Path, kind: str, field: str, value: float, message: str
) -> None:
    layer = make_layer("n", kind)
    tensor = getattr(layer, field)
    tensor[(0,) * tensor.ndim] = value
    write_pack(tmp_path / "bad", make_manifest(), {"n": layer})
    with pytest.raises(PackError, match=f"layer n.*{message}"):
        read_pack(tmp_path / "bad")


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("recipe", ["omega", "omega-paper", "w4a16", "w4a8"])
def test_every_preset_verifies_and_runs(family: str, recipe: str, tmp_path: Path) -> None:
    policy = TINY[family]()
    quantize_policy(policy, preset(recipe), tiny_samples(2), out=tmp_path / "p")
    table = verify_pack(tmp_path / "p", policy)
    assert sum(check.what == "weight" for check in table) == len(read_pack(tmp_path / "p").layers)
    apply_pack(policy, tmp_path / "p")
    assert np.isfinite(policy.infer(tiny_observation(7))).all()
