"""`omega-qvla quantize --from-published`: a pack of the published code becomes one of ours."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import loading
from omega_qvla.cli.overrides import OVERRIDES
from omega_qvla.cli.parsing import SAMPLES
from omega_qvla.errors import ConfigError

ACTIVATIONS = ("none", "per_token", "per_token_group")
#: What a conversion has no use for, with its default: giving it as well would be ignored.
_WITHOUT_EFFECT: Mapping[str, Any] = {
    **dict.fromkeys(("include", "exclude", "calibration", "observations", "dataset", "camera")),
    **dict.fromkeys(("state_key", "held_out", "env", "tasks", "protocol", "assets")),
    **dict.fromkeys(("save_observations", "num_steps", "token_cap")),
    **dict.fromkeys(("allow_protected", "cascade", "no_resume", "substitutes"), False),
    "recipe": "omega",
    "side": "both",
    "dtype": "float32",
    "num_samples": SAMPLES,
    "seed": 0,
}


def add_published(parser: argparse.ArgumentParser) -> None:
    """--from-published and --activation."""
    group = parser.add_argument_group("instead of a build")
    group.add_argument(
        "--from-published",
        type=Path,
        metavar="FILE",
        help="convert this `quantized.pt` of the published code, built from CHECKPOINT",
    )
    group.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="of layers whose activation scales the file does not hold (the backbone's); "
        "their bits by --act-bits (default: 4)",
    )


def convert(args: argparse.Namespace, console: Console) -> None:
    """Write the pack. Raises ConfigError on options that a conversion has no use for."""
    from omega_qvla.config import ActivationScheme
    from omega_qvla.pack.upstream import convert_published, read_published
    from omega_qvla.policies.registry import load_policy

    overrides = [flag.replace("-", "_") for flag in OVERRIDES if flag != "act-bits"]
    useless = {**_WITHOUT_EFFECT, **dict.fromkeys(overrides)}
    given = [name for name, default in useless.items() if getattr(args, name) != default]
    if args.act_bits is not None and args.activation in (None, "none"):
        given.append("act_bits")
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"a published pack is converted as it is: leave out {flags}")
    activation = None
    if args.activation is not None:
        activation = ActivationScheme(args.activation, bits=args.act_bits or 4)
    published = read_published(args.from_published)
    console.note(f"{args.from_published}: {len(published.records)} layers")
    console.note(f"loading {args.checkpoint}")
    policy = load_policy(args.checkpoint, device=args.device, **loading(args))
    convert_published(published, policy, args.out, activation=activation)
