"""`omega-qvla verify`: is this pack whole, and is it of this checkpoint?"""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import add_loading, loading

DESCRIPTION = """\
Check a pack: every byte against its sha256, every layer against its scheme. With the
checkpoint, also that the pack was made from exactly this one, and how far each layer's
4-bit weights are from its weights (NMSE: error energy over weight energy). Of a bundle,
every file is checked against the manifest, then the pack in it.

Exit code 0 if everything holds, 2 if not.
"""
EXAMPLES = """\
  omega-qvla verify omega.safetensors
  omega-qvla verify omega.safetensors assets/pi05-metaworld
  omega-qvla verify policy.bundle
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pack", type=Path, metavar="PACK", help="a pack file, or a bundle")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, help="the checkpoint that it was made from"
    )
    add_loading(parser)
    parser.add_argument("--all", action="store_true", help="list every check, not only failures")


def run(args: argparse.Namespace, console: Console) -> int:
    """Check and show."""
    from omega_qvla.bundle.manifest import PACK, is_bundle, read_bundle
    from omega_qvla.pack.verify import verify_pack
    from omega_qvla.policies.registry import load_policy

    pack = args.pack
    if is_bundle(pack):
        read_bundle(pack)
        console.text(f"{pack}: every file by sha256: ok")
        pack = pack / PACK
    policy = None
    if args.checkpoint is not None:
        console.note(f"loading {args.checkpoint}")
        policy = load_policy(args.checkpoint, **loading(args))
    checks = verify_pack(pack, policy, strict=False)
    failed = [check for check in checks if not check.passed]
    shown = [c for c in checks if args.all or not c.passed or c.layer is None]
    rows = [
        (c.layer or "the file", c.what, "ok" if c.passed else "FAILED", c.detail) for c in shown
    ]
    console.table(["what", "check", "result", "found"], rows, left=4)
    errors = [c.value for c in checks if c.what == "weight" and c.value is not None]
    layers = len({c.layer for c in checks if c.layer})
    verdict = "everything holds" if not failed else f"{len(failed)} FAILED"
    console.text(f"{len(checks)} checks of {layers} layers: {verdict}")
    if errors:
        middle = sorted(errors)[len(errors) // 2]
        console.text(f"weights: NMSE median {middle:.4f}, largest {max(errors):.4f}")
    console.result(
        {
            "pack": str(args.pack),
            "checkpoint": None if args.checkpoint is None else str(args.checkpoint),
            "passed": not failed,
            "checks": [
                {
                    "layer": c.layer,
                    "what": c.what,
                    "passed": c.passed,
                    "detail": c.detail,
                    "value": c.value,
                }
                for c in checks
            ],
        }
    )
    return 2 if failed else 0
