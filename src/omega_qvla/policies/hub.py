"""Where a checkpoint is: a folder here, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from omega_qvla.errors import CheckpointError

#: `owner/name`, as the Hub writes it.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: What a policy needs: never code, pickles or training states, which may be far bigger.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "assets/*", "experiment_cfg/*.json")
IGNORED = ("*optimizer*", "*training_state*", "checkpoint-*")


def locate(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
) -> Path:
    """The folder of a checkpoint, downloaded first if it is on the Hub.

    Args:
        path: a folder, or `owner/name` where no such folder exists.
        revision: branch, tag or commit on the Hub.
        offline: look into the Hub's local cache only.
        cache: that cache, if it is not where the library has it.

    The download shows its progress, goes on where an interrupted one ended, and is not repeated.

    Raises:
        CheckpointError: neither a folder nor a repository; or it cannot be had, and why.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not is_repository(path):
        raise CheckpointError(
            f"{folder} is not a directory: give the checkpoint's, or its id on the Hub (owner/name)"
        )
    hub = _library(str(path))
    with _named_failures(str(path), offline):
        found = hub.snapshot_download(
            str(path),
            revision=revision,
            cache_dir=cache,
            local_files_only=offline,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(IGNORED),
        )
    return Path(found)


def locate_file(
    repository: str, name: str, *, offline: bool = False, cache: Path | None = None
) -> Path:
    """One file of a repository on the Hub. Raises CheckpointError, as `locate`."""
    hub = _library(repository)
    with _named_failures(f"{repository}/{name}", offline):
        found = hub.hf_hub_download(repository, name, cache_dir=cache, local_files_only=offline)
    return Path(found)


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether `path` reads like `owner/name` and nothing here is called so."""
    return _REPOSITORY.fullmatch(str(path)) is not None and not Path(path).exists()


def _library(what: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{what} is not a directory here; to look for it on the Hugging Face Hub, install "
            "omega-qvla[checkpoints]"
        ) from None
    return huggingface_hub


@contextmanager
def _named_failures(what: str, offline: bool) -> Iterator[None]:
    """Turn the library's failures into a CheckpointError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: accept its licence on the Hub and log in (`hf auth login`)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{what} is neither a directory here nor a repository (or revision) on the Hugging "
            "Face Hub that you may read"
        ) from error
    except errors.EntryNotFoundError as error:
        why = "and offline was asked for" if offline else "and the Hub cannot be reached"
        raise CheckpointError(
            f"{what} is neither a directory here nor in the Hugging Face cache, {why}: download "
            "it where there is a network, or give a local directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{what} could not be downloaded: {error}; run it again to go on where it stopped"
        ) from error
