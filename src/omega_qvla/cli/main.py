"""Entry point: finds the verb, hands over, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

from omega_qvla import __version__
from omega_qvla.errors import OmegaError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Verb(NamedTuple):
    """module: has `configure(parser)` and `run(args, console) -> int`; help: one line."""

    module: str
    help: str


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "demo": Verb("omega_qvla.cli.demo.verb", "see it work: the two bundled policies, to W4A4"),
        "info": Verb("omega_qvla.cli.info", "what this machine can run, or what a checkpoint is"),
        "calibrate": Verb("omega_qvla.cli.calibrate", "observe a checkpoint's activations"),
        "quantize": Verb("omega_qvla.cli.quantize", "make a 4-bit pack from a checkpoint"),
        "merge": Verb("omega_qvla.cli.merge", "join packs, e.g. of backbone and action head"),
        "bundle": Verb("omega_qvla.cli.bundle", "one folder that runs without the checkpoint"),
        "inspect": Verb("omega_qvla.cli.inspect", "show what is in a pack"),
        "verify": Verb("omega_qvla.cli.verify", "prove a pack, alone or against its checkpoint"),
        "eval": Verb("omega_qvla.cli.evaluate", "let policies act in a simulator and count"),
        "serve": Verb("omega_qvla.cli.serve", "a policy behind openpi's websocket protocol"),
        "bench": Verb("omega_qvla.cli.bench", "time a checkpoint and its pack on this machine"),
        "compare": Verb("omega_qvla.cli.compare", "set policies side by side, paired"),
    }
)

_DESCRIPTION = """\
Real 4-bit weights and activations for vision-language-action robot policies.

A checkpoint and a handful of observations go in, a checked 4-bit pack comes out; the
pack then acts in a simulator, and is measured against the original.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 on a named error, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(words)
        if args.verb is None:
            _parser().print_help()
            return 0
        _check_verb(args.verb)
        return _run(args.verb, args.rest, args.debug)
    except SystemExit as leaving:  # argparse: --help is 0, wrong usage is 2
        return leaving.code if isinstance(leaving.code, int) else EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.help}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="omega-qvla",
        description=_DESCRIPTION,
        epilog=f"verbs:\n{verbs}\n\n`omega-qvla VERB --help` explains a verb, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="omega-qvla [-h] [--version] [--debug] VERB ...",
    )
    parser.add_argument("--version", action="version", version=f"omega-qvla {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("verb", nargs="?", metavar="VERB", help="what to do (see below)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _check_verb(verb: str) -> None:
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(VERBS)}"
        print(f"omega-qvla: unknown verb {verb!r}; {hint}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR)


def _run(verb: str, words: Sequence[str], debug: bool) -> int:
    from omega_qvla.cli.parsing import check_device, verb_parser

    module = import_module(VERBS[verb].module)
    parser = verb_parser(verb, module.DESCRIPTION, module.EXAMPLES)
    module.configure(parser)
    args = parser.parse_args(words)
    debug = debug or args.debug
    from omega_qvla.cli.console import Console

    console = Console(as_json=args.json, quiet=args.quiet)
    try:
        check_device(getattr(args, "device", "cpu"))
        code: int = module.run(args, console)
        return code
    except KeyboardInterrupt:
        print(f"\nomega-qvla {verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        sys.stderr.close()
        return 0
    except (OmegaError, OSError) as error:
        if debug:
            raise
        print(f"omega-qvla {verb}: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def one_line(error: Exception) -> str:
    """The first line of an error's message, with the kind of error before it."""
    lines = str(error).strip().splitlines() or ["no message"]
    more = " (--debug shows the rest)" if len(lines) > 1 else ""
    return f"{type(error).__name__}: {lines[0]}{more}"
