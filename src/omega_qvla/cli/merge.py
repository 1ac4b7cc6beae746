"""`omega-qvla merge`: several packs of one checkpoint become one."""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.quantize import show_sizes

DESCRIPTION = """\
Join packs that were built apart from the same checkpoint, for instance one of the
backbone and one of the action head. Packs that overlap, or that come from different
checkpoints, step counts or versions, are refused.
"""
EXAMPLES = """\
  omega-qvla merge backbone.safetensors action_head.safetensors --out omega.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("packs", nargs="+", type=Path, metavar="PACK", help="two or more packs")
    parser.add_argument("--out", type=Path, required=True, help="the pack to write")


def run(args: argparse.Namespace, console: Console) -> int:
    """Merge and show the sizes."""
    from omega_qvla.pack.merge import merge_packs

    merge_packs(args.packs, args.out)
    console.result(show_sizes(args.out, console))
    return 0
