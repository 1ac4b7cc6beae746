"""What the verbs' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from omega_qvla.cli.loading import add_loading
from omega_qvla.errors import ConfigError

#: As in `omega_qvla.envs.libero_protocol`.
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
SIDES = ("backbone", "action_head")
#: As in `omega_qvla.calibration`, which would bring torch: --help is to be instant.
SAMPLES, HELD_OUT = 10, 0.2
#: Held-out observations that drift is measured on, where nobody says how many.
DRIFT_SAMPLES = 20
#: Tokens kept per layer and denoising step in the published builds.
TOKEN_CAPS = {"groot_n15": 1024, "pi05": 512}


def verb_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that every verb has."""
    parser = argparse.ArgumentParser(
        prog=f"omega-qvla {verb}",
        description=description.strip(),
        epilog=f"examples:\n{examples.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = parser.add_argument_group("output")
    common.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def at_least(low: int) -> Callable[[str], int]:
    """An argument type: an integer not below `low`."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        return value

    number.__name__ = "integer"  # argparse puts it into "invalid integer value"
    return number


def add_checkpoint(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The positional argument CHECKPOINT, and the options to read it."""
    parser.add_argument(
        "checkpoint",
        nargs="?" if optional else None,
        type=Path,
        metavar="CHECKPOINT",
        help="directory of a pi0.5 or GR00T N1.5 checkpoint (openpi, LeRobot, Isaac-GR00T), or "
        "its id on the Hugging Face Hub (owner/name)",
    )
    add_loading(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def check_device(name: str) -> None:
    """Raise ConfigError unless tensors can be had on the torch device `name`, before any work."""
    if name == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--device {name}: not on this machine or with this torch ({reason}); leave it out "
            "for the CPU"
        ) from error


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend and --device."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="what runs the quantized layers; `omega-qvla info` lists them "
        "(default: auto, the fastest that covers the pack)",
    )
    add_device(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Where observations come from, and how many of them are used how."""
    group = parser.add_argument_group("calibration")
    add_recordings(group)
    group.add_argument(
        "--env",
        choices=["metaworld", *LIBERO_SUITES],
        metavar="NAME",
        help="collect observations from scripted experts in this simulator: metaworld, or a "
        "suite of LIBERO's",
    )
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="with --env (default: all)")
    add_libero(group)
    group.add_argument(
        "--save-observations", type=Path, metavar="FILE", help="with --env: keep them here"
    )
    group.add_argument(
        "--num-samples",
        type=at_least(1),
        default=SAMPLES,
        metavar="N",
        help=f"observations to use, balanced over tasks and episodes (default: {SAMPLES})",
    )
    group.add_argument(
        "--token-cap",
        type=at_least(1),
        metavar="N",
        help="tokens kept per layer and denoising step (default, as published: "
        f"{TOKEN_CAPS['groot_n15']} for GR00T N1.5, {TOKEN_CAPS['pi05']} for pi0.5)",
    )
    group.add_argument(
        "--num-steps",
        type=at_least(1),
        metavar="N",
        help="denoising steps to calibrate for (default: the checkpoint's own)",
    )
    group.add_argument("--seed", type=at_least(0), default=0, help="of every random choice")


def add_libero(group: argparse._ArgumentGroup) -> None:
    """How LIBERO is played, and on which assets: --protocol, --assets, --substitutes."""
    group.add_argument(
        "--protocol",
        metavar="NAME",
        help="LIBERO: openpi (default), gr00t-n1.5, omega-paper, or a YAML file of your own",
    )
    group.add_argument("--assets", type=Path, metavar="DIR", help="LIBERO: where its assets are")
    group.add_argument(
        "--substitutes",
        action="store_true",
        help="LIBERO: accept assets that are not all its own; results say so",
    )


def add_recordings(group: argparse._ArgumentGroup) -> None:
    """Observations that are read: --observations, --dataset and what belongs to them."""
    group.add_argument(
        "--observations",
        type=Path,
        metavar="PATH",
        help="a file that omega-qvla wrote, or a folder of recorded episodes",
    )
    group.add_argument(
        "--dataset", type=Path, metavar="DIR", help="a LeRobot dataset (v2.0, v2.1, v3.0)"
    )
    group.add_argument(
        "--camera",
        action="append",
        type=labelled,
        metavar="NAME=KEY",
        help="the policy's camera NAME is KEY of the dataset; may be repeated",
    )
    group.add_argument(
        "--state-key",
        action="append",
        metavar="KEY[=0:7,22]",
        help="key of the state, perhaps with columns; repeated: joined in this order "
        "(default: observation.state)",
    )
    group.add_argument(
        "--held-out",
        type=fraction,
        metavar="FRACTION",
        help="share of every task's episodes that calibration leaves alone and drift is "
        f"measured on (default: {HELD_OUT} of a dataset or folder; 0: none)",
    )


def fraction(text: str) -> float:
    """An argument type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), not {text}")
    return value


def counts(text: str) -> list[int]:
    """An argument type: positive integers with commas between them, returned ascending."""
    try:
        values = sorted({at_least(1)(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N,N,..., got {text!r}") from None
    return values


def labelled(text: str) -> tuple[str, str]:
    """An argument type: LABEL=VALUE."""
    label, equals, value = text.partition("=")
    if not (label and equals and value):
        raise argparse.ArgumentTypeError(f"expected LABEL=VALUE, got {text!r}")
    return label, value


def unique(pairs: list[tuple[str, str]] | None, what: str) -> dict[str, str]:
    """LABEL=VALUE arguments as a dictionary. Raises ConfigError where a label is used twice."""
    found: dict[str, str] = {}
    for label, value in pairs or []:
        if label in found:
            raise ConfigError(f"{what} {label!r} is given twice; every label once")
        found[label] = value
    return found
