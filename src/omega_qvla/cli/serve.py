"""`omega-qvla serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla.cli.console import Console
from omega_qvla.cli.loading import add_pack_options, loading, pack_options
from omega_qvla.cli.parsing import add_backend, add_checkpoint, at_least

DESCRIPTION = """\
Serve a checkpoint, with a pack if one is given, over openpi's websocket protocol: its
clients need no change, and `omega-qvla eval --policy ws://HOST:PORT` gets the actions
that the policy gives in process. Non-finite actions are refused, not sent.

There is no authentication: the default is to listen to this machine only.
"""
EXAMPLES = """\
  omega-qvla serve CHECKPOINT --pack omega.safetensors --port 8000
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument("--pack", type=Path, metavar="FILE")
    parser.add_argument(
        "--host", default="127.0.0.1", help="interface to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=at_least(0), default=8000, help="0: a free one (default: 8000)"
    )
    add_pack_options(parser)
    add_backend(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Load, and serve until interrupted."""
    from omega_qvla.bundle.manifest import is_bundle
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.evaluation.policies import arm_fingerprint
    from omega_qvla.evaluation.records import Arm
    from omega_qvla.runtime.engine import Engine
    from omega_qvla.serving.server import PolicyServer, describe

    options = loading(args)
    path = open_checkpoint(args.checkpoint, **options).path
    quantized = args.pack is not None or is_bundle(path)
    engine = Engine.load(
        path,
        args.pack,
        backend=args.backend,
        device=args.device,
        **options,
        **(pack_options(args) if quantized else {}),
    )
    pack = None if args.pack is None else str(args.pack)
    arm = Arm("served", str(path), engine.policy.family, pack=pack, device=args.device)
    metadata = describe(engine.policy, engine.backend, arm_fingerprint(arm, "", {}))
    server = PolicyServer(engine.policy, metadata, args.host, args.port)
    server.serve_forever(
        lambda port: console.note(
            f"serving {args.checkpoint} ({engine.backend}) on ws://{args.host}:{port}"
        )
    )
    return 0
