from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omega_qvla.config.recipe import ActivationScheme, Scheme, WeightScheme
from omega_qvla.errors import PackError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.pack import files, read_manifest, read_pack, verify_pack, write_pack
from pack.layers import SCHEMES, all_layers, make_layer, make_manifest, random_weight


def same_layer(one: QuantizedLayer, other: QuantizedLayer) -> bool:
    plain = [
        (x.name, x.side, x.in_features, x.out_features, x.scheme, x.num_steps) for x in (one, other)
    ]
    a, b = one.tensors(), other.tensors()
    return (
        plain[0] == plain[1]
        and set(a) == set(b)
        and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    )


def test_every_kind_of_layer_survives(tmp_path: Path) -> None:
    layers = all_layers()
    stored = {field for layer in layers.values() for field in layer.tensors()}
    assert len(stored) == 11, "the samples do not cover every tensor that a layer can have"
    written = write_pack(tmp_path / "a.pack", make_manifest(), layers)
    pack = read_pack(tmp_path / "a.pack")
    assert pack.manifest == written == read_manifest(tmp_path / "a.pack")
    assert set(pack.layers) == set(layers)
    assert all(same_layer(pack.layers[name], layers[name]) for name in layers)


def test_same_content_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    layers = all_layers()
    write_pack(tmp_path / "a", make_manifest(), layers)
    write_pack(tmp_path / "b", make_manifest(), dict(reversed(layers.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    layer = make_layer("net.0")
    write_pack(tmp_path / "a", make_manifest(), {"net.0": layer})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == {f"net.0.{field}" for field in layer.tensors()}
        assert torch.equal(file.get_tensor("net.0.qweight"), layer.qweight)


def test_sizes_count_every_stored_byte(tmp_path: Path) -> None:
    layers = all_layers()
    write_pack(tmp_path / "a", make_manifest(), layers)
    sizes = read_pack(tmp_path / "a").sizes()
    header = files.read_header(tmp_path / "a")
    assert sizes.layer_bytes == sizes.file_bytes - header.data_start
    assert sizes.layer_bytes_16bit == 2 * (4 * 96 * 128 + 3 * 96)
    assert sizes.ratio == sizes.layer_bytes / sizes.layer_bytes_16bit


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_wide_enough_layer_is_under_a_third(kind: str, tmp_path: Path) -> None:
    write_pack(tmp_path / "a", make_manifest(), {"n": make_layer("n", kind)})
    ratio = read_pack(tmp_path / "a").sizes().ratio
    # 96 x 128 is tiny: bias and smoothing weigh little, but 64 x 64 rotations do.
    assert 0.25 < ratio < (0.30 if kind != "everything" else 2.0)


def test_failure_in_mid_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_pack(path, make_manifest(), {"net.0": make_layer("net.0")})
    before = path.read_bytes()
    real, calls = files.tensor_bytes, []

    def failing(tensor: torch.Tensor) -> memoryview:
        calls.append(tensor)
        if len(calls) == 14:  # 11 are hashed, then the third is written
            raise OSError(28, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(files, "tensor_bytes", failing)
    with pytest.raises(PackError, match="No space left"):
        write_pack(path, make_manifest(), {"net.1": make_layer("net.1", "everything")})
    assert len(calls) == 14
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_interruption_in_mid_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path / "a", make_manifest(), {"net.0": make_layer("net.0")})
    assert not list(tmp_path.iterdir())


def test_refuses_to_write_nonsense(tmp_path: Path) -> None:
    layer = make_layer("net.0")
    with pytest.raises(PackError, match="at least one layer"):
        write_pack(tmp_path / "a", make_manifest(), {})
    with pytest.raises(PackError, match=r"net\.0 was filed under the name other"):
        write_pack(tmp_path / "a", make_manifest(), {"other": layer})
    with pytest.raises(PackError, match="JSON"):
        write_pack(tmp_path / "a", make_manifest(calibration={"x": float("nan")}), {"net.0": layer})
    with pytest.raises(PackError, match="cannot be written"):
        write_pack(tmp_path / "no" / "a", make_manifest(), {"net.0": layer})
    assert not list(tmp_path.iterdir())


def test_signed_scales_survive_and_verify(tmp_path: Path) -> None:
    scheme = Scheme(
        weight=WeightScheme(signed=True), activation=ActivationScheme("per_token", signed=True)
    )
    weight, bias = random_weight(0)
    layer = quantize_layer("n", "backbone", weight, bias, scheme, None, None)
    assert bool((layer.weight_scale < 0).any())
    write_pack(tmp_path / "a", make_manifest(), {"n": layer})
    assert same_layer(read_pack(tmp_path / "a").layers["n"], layer)
    assert all(check.passed for check in verify_pack(tmp_path / "a"))


def test_what_came_later_is_not_in_older_manifests(tmp_path: Path) -> None:
    write_pack(tmp_path / "a", make_manifest(), all_layers())
    assert b"signed" not in (tmp_path / "a").read_bytes()
