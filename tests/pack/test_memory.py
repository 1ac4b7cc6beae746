"""A pack is loaded layer by layer: it is never in memory twice, nor in 16 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omega_qvla.config import preset
from omega_qvla.errors import PackError
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.writer import write_pack

from .layers import all_layers, make_manifest

#: In a process of its own: bytes above the interpreter, of which the peak is the bar's.
_LOAD = """
import json, sys
import torch
from torch import nn
from omega_qvla.evaluation.peak_memory import reset_peak, resident
from omega_qvla.kernels.cpu import isa_names
from omega_qvla.modules.linear import QuantLinear, replace_linears
from omega_qvla.pack.reader import read_pack

isa_names()
base = resident()
reset_peak()
pack = read_pack(sys.argv[1])
with torch.device("meta"):  # the 16-bit weights are nowhere
    blocks = [nn.ModuleDict({n: nn.Linear(2048, 16384, bias=False) for n in ("gate", "up")})
              for _ in range(len(pack.layers) // 2)]
network = nn.ModuleList(blocks)
together = [(f"{i}.gate", f"{i}.up") for i in range(len(blocks))]
replace_linears(network, pack.layers, "native", torch.device("cpu"), together)
assert all(isinstance(m, QuantLinear) for b in network for m in b.values())
print(json.dumps({"file": pack.path.stat().st_size, "peak": resident("VmHWM") - base}))
"""


def true_layers(blocks: int) -> dict[str, QuantizedLayer]:
    """gate and up of so many of pi0.5's language layers, random integers."""
    side = preset("omega").backbone
    assert side is not None
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in (f"{i}.{part}" for i in range(blocks) for part in ("gate", "up")):
        layers[name] = QuantizedLayer(
            name=name,
            side="backbone",
            in_features=2048,
            out_features=16384,
            scheme=side.scheme,
            num_steps=None,
            qweight=torch.randint(0, 256, (16384, 1024), dtype=torch.uint8, generator=generator),
            weight_scale=torch.full((16384, 1), 0.01).half(),
            smooth=torch.ones(2048).half(),
        )
    return layers


@pytest.mark.slow
@pytest.mark.skipif(not isa_names(), reason="the native kernels are not built here")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_no_more_than_the_pack(tmp_path: Path) -> None:
    """Measured: 1.16 times the file, of which a joined pair of layers is 0.09."""
    write_pack(tmp_path / "pack", make_manifest(), true_layers(12))
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "pack")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    found = json.loads(run.stdout)
    assert found["file"] > 384 << 20
    assert found["peak"] < 1.2 * found["file"]


def test_layers_are_built_when_asked_for_and_are_those_that_were_written(tmp_path: Path) -> None:
    layers = all_layers()
    write_pack(tmp_path / "pack", make_manifest(), layers)
    stored = read_pack(tmp_path / "pack").layers
    assert set(stored) == set(layers) and len(stored) == len(layers)
    for name, layer in layers.items():
        found = stored[name]
        assert found is not stored[name]  # nothing is kept
        assert found.scheme == layer.scheme and set(found.tensors()) == set(layer.tensors())
        assert all(torch.equal(t, found.tensors()[key]) for key, t in layer.tensors().items())
    with pytest.raises(KeyError):
        stored["nobody"]


@pytest.mark.parametrize("how", ["rewritten", "gone"])
def test_a_file_that_changes_after_it_was_read_is_refused(tmp_path: Path, how: str) -> None:
    layers = all_layers()
    write_pack(tmp_path / "pack", make_manifest(), layers)
    pack = read_pack(tmp_path / "pack")
    name = next(iter(pack.layers))
    if how == "gone":
        (tmp_path / "pack").unlink()
    else:
        write_pack(tmp_path / "pack", make_manifest(num_steps=4), layers)
    with pytest.raises(PackError, match="gone since" if how == "gone" else "altered since"):
        pack.layers[name]
