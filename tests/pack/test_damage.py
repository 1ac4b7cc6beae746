"""Whatever happens to a pack file, reading it is refused and the damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omega_qvla.errors import PackError
from omega_qvla.pack import Manifest, read_manifest, read_pack, write_pack
from omega_qvla.pack.files import read_header, write_tensors
from omega_qvla.pack.manifest import sha256_text
from omega_qvla.pack.reader import load_tensors
from pack.layers import make_layer, make_manifest


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "a.pack"
    layers = {"net.0": make_layer("net.0", "plain"), "net.1": make_layer("net.1", "everything")}
    write_pack(path, make_manifest(), layers)
    read_pack(path)
    return path


def flip(path: Path, position: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def test_a_flipped_byte_in_the_length_field(pack: Path) -> None:
    for position in range(8):
        for bit in range(8):
            flip(pack, position, 1 << bit)
            with pytest.raises(PackError, match="length field"):
                read_pack(pack)
            flip(pack, position, 1 << bit)
    read_pack(pack)


def test_a_flipped_byte_anywhere_in_the_header(pack: Path) -> None:
    rng = np.random.default_rng(0)
    end = read_header(pack).data_start
    for position in range(8, end):
        mask = int(rng.integers(1, 256))
        flip(pack, position, mask)
        with pytest.raises(PackError, match=r"header|format version"):
            read_manifest(pack)
        flip(pack, position, mask)
    read_pack(pack)


def test_header_padding_and_quotes_count_too(pack: Path) -> None:
    end = read_header(pack).data_start
    raw = pack.read_bytes()
    spaces = [i for i in range(end - 8, end) if raw[i : i + 1] == b" "]
    escapes = [raw.index(b"\\\\u00f6") + 4]  # the manifest's own escape: \u00f6 -> \u00F6
    for position, mask in [(i, 0x20 ^ 0x09) for i in spaces] + [(i, 0x20) for i in escapes]:
        flip(pack, position, mask)
        with pytest.raises(PackError, match="header"):
            read_manifest(pack)
        flip(pack, position, mask)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b':"F16"', b':"I16"'), (b':"I32"', b':"F32"'), (b',"shape":[1,128]', b',"shape":[128,1]')],
)
def test_a_dtype_or_shape_that_would_still_fit(pack: Path, old: bytes, new: bytes) -> None:
    """The header stays well-formed and the data untouched: only the manifest can tell."""
    raw = pack.read_bytes()
    assert old in raw[: read_header(pack).data_start]
    pack.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(PackError, match=r"header is altered: net\.\d\.\w+ is"):
        read_manifest(pack)


def test_a_flipped_byte_in_the_data_names_the_tensor(pack: Path) -> None:
    rng = np.random.default_rng(1)
    header = read_header(pack)
    for name, entry in header.entries.items():
        places = [entry.begin, entry.end - 1, int(rng.integers(entry.begin, entry.end))]
        for place in places:
            mask = int(rng.integers(1, 256))
            flip(pack, header.data_start + place, mask)
            with pytest.raises(PackError, match=rf"altered tensor data: {name};"):
                read_pack(pack)
            flip(pack, header.data_start + place, mask)
    read_pack(pack)


def test_truncated_anywhere(pack: Path) -> None:
    raw = pack.read_bytes()
    start = read_header(pack).data_start
    for length in (0, 1, 7, 8, 9, 100, start - 1, start, start + 1, len(raw) // 2, len(raw) - 1):
        pack.write_bytes(raw[:length])
        with pytest.raises(PackError, match="truncated"):
            read_pack(pack)


def test_foreign_bytes_at_the_end(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes() + b"\0")
    with pytest.raises(PackError, match="foreign bytes"):
        read_pack(pack)


def test_two_tensors_exchanged(pack: Path) -> None:
    """Names are part of what is checked: equal sizes must not make layers interchangeable."""
    header = read_header(pack)
    tensors = load_tensors(pack, header.entries)
    one, two = "net.0.qweight", "net.1.qweight"
    tensors[one], tensors[two] = tensors[two], tensors[one]
    write_tensors(pack, tensors, header.metadata)
    with pytest.raises(PackError, match=r"net\.0\.qweight, net\.1\.qweight"):
        read_pack(pack)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x10" + b"\0" * 7 + b"[" * 16])
def test_not_a_pack_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PackError):
        read_pack(tmp_path / "x")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="No such file"):
        read_pack(tmp_path / "missing")
    with pytest.raises(PackError, match="directory"):
        read_pack(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(PackError, match="not"):
        read_pack(tmp_path / "plain")
    write_tensors(tmp_path / "ours", {"w": torch.zeros(2)}, {"format": "something else"})
    with pytest.raises(PackError, match="not an omega-qvla pack"):
        read_pack(tmp_path / "ours")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], **metadata: str) -> None:
    """Change the manifest as its author could have: every hash is made to fit again."""
    header = read_header(path)
    data = json.loads(header.metadata["manifest"])
    change(data)
    text = json.dumps(data)
    fitted = {"manifest": text, "manifest_sha256": sha256_text(text), **metadata}
    tensors = load_tensors(path, header.entries)
    write_tensors(path, tensors, {**header.metadata, **fitted})


def test_a_future_version_is_refused_by_number(pack: Path) -> None:
    rewrite(pack, lambda data: data.update(format_version=2, novelty=1), format_version="2")
    with pytest.raises(PackError, match="version 2; this omega-qvla reads version 1: upgrade"):
        read_pack(pack)


def test_the_manifest_cannot_disguise_its_version(pack: Path) -> None:
    rewrite(pack, lambda data: data.update(format_version=2))
    with pytest.raises(PackError, match="version 2"):
        read_pack(pack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(novelty=1), "novelty"),
        (lambda d: d.pop("source"), "exactly the keys"),
        (lambda d: d.update(layers=[]), "layers is not a mapping"),
        (lambda d: d["layers"]["net.0"].update(side="tail"), r"layer net\.0: impossible side"),
        (lambda d: d["layers"]["net.0"].update({"in": 130}), r"layer net\.0.*qweight"),
        (lambda d: d["layers"]["net.0"]["scheme"].update(trick=1), "unknown scheme.*trick"),
        (lambda d: d["layers"].pop("net.0"), r"of no layer.*net\.0\.qweight"),
        (lambda d: d["layers"].update(extra=d["layers"]["net.0"]), "layer extra"),
        (lambda d: d["layers"]["net.1"].update(num_steps=7), r"net\.1.*act_scale"),
        (lambda d: d["tensors"]["net.0.qweight"].update(shape=5), r"net\.0\.qweight: impossible"),
        (lambda d: d["tensors"]["net.0.qweight"].update(sha256=5), r"net\.0\.qweight: impossible"),
        (lambda d: d.update(num_steps="ten"), "family 'pi05' and 'ten' denoising steps"),
        (lambda d: d.update(num_steps=0), "0 denoising steps"),
        (lambda d: d.update(family=None), "family None"),
        (lambda d: d.update(source={"w": 1}), "source holds something else"),
    ],
)
def test_a_wrong_manifest_with_right_hashes(
    pack: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(pack, change)
    with pytest.raises(PackError, match=message):
        read_pack(pack)


def test_a_manifest_too_deep_to_be_parsed(pack: Path) -> None:
    header = read_header(pack)
    text = '{"a":' * 100_000 + "1" + "}" * 100_000
    altered = {**header.metadata, "manifest": text, "manifest_sha256": sha256_text(text)}
    write_tensors(pack, load_tensors(pack, header.entries), altered)
    with pytest.raises(PackError, match="not JSON"):
        read_pack(pack)


def test_manifest_json_is_the_identity() -> None:
    manifest = make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest
