from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from omega_qvla import __version__
from omega_qvla.calibration.collect import DEFAULT_TOKEN_CAP
from omega_qvla.calibration.samples import DEFAULT_SAMPLES
from omega_qvla.cli import parsing
from omega_qvla.cli.main import VERBS, main
from omega_qvla.errors import PackError


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and verb.help in text for name, verb in VERBS.items())


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: omega-qvla {verb}")
    description, _, examples = text.partition("examples:")
    assert f"  omega-qvla {verb}" in examples
    assert len(description.split("options:")[0].split()) > 40
    assert "--json" in description


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from omega_qvla.cli.main import VERBS, main\n"
        "for words in [['--help'], *([verb, '--help'] for verb in VERBS)]:\n"
        "    assert main(words) == 0\n"
        "heavy = {'torch', 'numpy', 'mujoco', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"omega-qvla {__version__}"


@pytest.mark.parametrize(
    ("word", "hint"), [("quantise", "did you mean 'quantize'?"), ("xyz", "one of demo, info")]
)
def test_unknown_verbs_are_named(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert f"unknown verb {word!r}; {hint}" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge"]) == 2
    assert main(["quantize", "somewhere", "--out", "x", "--num-samples", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.safetensors"
    assert main(["inspect", str(missing), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("omega-qvla inspect: PackError: ")
    assert str(missing) in line


@pytest.mark.parametrize("words", [["--debug", "inspect"], ["inspect", "--debug"]])
def test_debug_raises_the_error(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(PackError):
        main([*words, str(tmp_path / "missing.safetensors")])


def test_defaults_are_the_library_s() -> None:
    assert parsing.SAMPLES == DEFAULT_SAMPLES
    assert max(parsing.TOKEN_CAPS.values()) == DEFAULT_TOKEN_CAP
