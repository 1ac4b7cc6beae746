"""How a checkpoint is found and read: the options that every verb with a CHECKPOINT has."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from omega_qvla.errors import ConfigError

#: As in `config.recipe.ActivationScheme`.
ACT_BITS = (4, 6, 8)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """--settings, --tokenizer, --revision, --offline."""
    group = parser.add_argument_group("reading the checkpoint (docs/checkpoints.md)")
    group.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with what the checkpoint does not say itself (cameras, embodiment_id, "
        "asset_id, ...)",
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer file or folder, for checkpoints that come without",
    )
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit on the Hugging Face Hub"
    )
    group.add_argument(
        "--offline", action="store_true", help="look into the Hub's local cache only"
    )


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    """--act-bits and --missing: of packs that are put to work."""
    group = parser.add_argument_group("running the packs")
    group.add_argument(
        "--act-bits",
        type=int,
        choices=ACT_BITS,
        help="round activations to so many bits, whatever the pack says (6: emulated only)",
    )
    group.add_argument(
        "--missing",
        choices=["error", "fallback"],
        default="fallback",
        help="layers that the family quantizes by default and a pack does not hold: refuse, or "
        "run them as they are (default: fallback)",
    )


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_loading` as keyword arguments of `load_policy`, `read_outline`,
    `write_bundle` and `Engine.load`. Raises ConfigError."""
    if args.quiet:
        _silence_downloads(args)
    return {
        "settings": None if args.settings is None else read_settings(args.settings),
        "tokenizer": args.tokenizer,
        "revision": args.revision,
        "offline": args.offline,
    }


def _silence_downloads(args: argparse.Namespace) -> None:
    """No progress bars of the Hub's library, if the checkpoint is there."""
    from omega_qvla.policies.hub import is_repository

    given = getattr(args, "checkpoint", None) or getattr(args, "path", None)
    if given is not None and is_repository(given):
        with suppress(ImportError):  # `locate` says what is missing
            from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

            disable_progress_bars()


def pack_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_pack_options` as keyword arguments of `Engine.load`."""
    return {"act_bits": args.act_bits, "missing": args.missing}


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ConfigError naming the file."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the settings cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML or JSON: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: the settings must be a mapping, such as `cameras: [base]`")
    return data
