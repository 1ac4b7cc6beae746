"""`quantize --from-published`: the whole way, from a published file to an acting policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omega_qvla.cli.main import main
from omega_qvla.cli.overrides import OVERRIDES
from omega_qvla.cli.parsing import verb_parser
from omega_qvla.cli.published import _WITHOUT_EFFECT
from omega_qvla.cli.quantize import configure
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.registry import save_policy
from pack.published import STEPS, published_content, write_published
from policies.tiny import tiny_pi05


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint and the published pack of it."""
    folder = tmp_path_factory.mktemp("published")
    policy = tiny_pi05(num_steps=STEPS)
    save_policy(policy, folder / "checkpoint", dtype=torch.float32)
    content = published_content(policy)
    for name in content:
        content[name].pop("q_truth", None)
    write_published(content, folder / "quantized.pt")
    return folder


def convert(place: Path, out: Path, *words: str) -> int:
    source = [f"{place}/checkpoint", "--from-published", f"{place}/quantized.pt"]
    return main(["quantize", *source, "--out", str(out), *words, "--quiet"])


def test_a_file_becomes_a_pack_that_proves_itself(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.safetensors"
    assert convert(place, out, "--activation", "per_token", "--act-bits", "8") == 0
    layers = read_pack(out).layers.values()
    kinds = {layer.side: layer.scheme.activation for layer in layers}
    assert (kinds["backbone"].kind, kinds["backbone"].bits) == ("per_token", 8)
    assert (kinds["action_head"].kind, kinds["action_head"].bits) == ("per_step_channel", 4)
    assert main(["verify", str(out), f"{place}/checkpoint", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--no-layers"]) == 0
    assert "published pack quantized.pt" in capsys.readouterr().out


def test_every_option_that_a_conversion_ignores_is_refused() -> None:
    parser = verb_parser("quantize", "", "")
    configure(parser)
    options = {action.dest for action in parser._actions}
    used = {"help", "json", "quiet", "debug", "checkpoint", "out", "device", "backend"}
    used |= {"settings", "tokenizer", "revision", "offline", "from_published", "activation"}
    overrides = {flag.replace("-", "_") for flag in OVERRIDES}  # --act-bits completes --activation
    assert options - used - overrides == set(_WITHOUT_EFFECT)
    assert all(parser.get_default(name) == _WITHOUT_EFFECT[name] for name in _WITHOUT_EFFECT)


def test_scales_that_no_file_holds_are_asked_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(place, tmp_path / "p.safetensors") == 2
    assert "no activation scales" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--damp", "0.1"],
        ["--num-steps", "4"],
        ["--act-bits", "8"],
        ["--dataset", "nowhere"],
        ["--cascade"],
        ["--side", "backbone"],
        ["--recipe", "rtn"],
        ["--token-cap", "7"],
        ["--dtype", "bfloat16"],
    ],
)
def test_options_without_effect_are_refused(
    place: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(place, tmp_path / "p.safetensors", *words) == 2
    assert f"leave out {words[0]}" in capsys.readouterr().err


def test_activation_without_a_file_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", f"{place}/checkpoint", "--recipe", "rtn", "--activation", "none"]
    assert main([*words, "--out", f"{tmp_path}/p.safetensors"]) == 2
    assert "--from-published" in capsys.readouterr().err
