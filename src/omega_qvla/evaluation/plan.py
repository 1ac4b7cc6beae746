"""An evaluation as a value: who plays what, how; and what must not change in between."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.evaluation.environment import versions
from omega_qvla.evaluation.records import Arm, Episode, Protocol

#: Simulators by name; anything else is given as "module:function".
ENVIRONMENTS: Mapping[str, str] = MappingProxyType(
    {
        "metaworld": "omega_qvla.envs.metaworld:MetaWorldEnv",
        "libero": "omega_qvla.envs.libero:LiberoEnv",
    }
)


@dataclass(frozen=True)
class Plan:
    """Everything that determines the records of an evaluation.

    arms, episodes: every arm plays every episode.
    protocol:       how an episode is played.
    env:            a name in `ENVIRONMENTS`, or "module:function"; the function takes
                    the task and `env_options` and returns an `Env`. The option of
                    metaworld is `size`, the edge of the images in pixels.
    env_options:    keyword arguments of that function (JSON values).
    loader:         "module:function" that turns an `Arm` into a policy. Functions are
                    named, not passed: worker processes import them.
    """

    arms: tuple[Arm, ...]
    episodes: tuple[Episode, ...]
    protocol: Protocol = field(default_factory=Protocol)
    env: str = "metaworld"
    env_options: Mapping[str, Any] = field(default_factory=dict)
    loader: str = "omega_qvla.evaluation.rollout:load_arm"

    def __post_init__(self) -> None:
        keys = [arm.key for arm in self.arms]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"arms appear twice in the evaluation: {', '.join(twice)}")
        if not keys or not self.episodes:
            raise ConfigError("an evaluation needs at least one arm and one episode")
        if len(set(self.episodes)) != len(self.episodes):
            raise ConfigError("an episode (task, seed) appears twice in the evaluation")

    def settings(self) -> dict[str, Any]:
        """What every record of one results file has in common, JSON-ready."""
        return {
            "protocol": asdict(self.protocol),
            "env": self.env,
            "env_options": dict(self.env_options),
            "versions": versions(),
        }

    def arm_fingerprints(self) -> dict[str, dict[str, str]]:
        """Per arm: backend, device, and the SHA-256 of the files it consists of.

        Contents, not paths: a results file stays valid when a directory moves, and
        does not when a pack is rebuilt differently under the same name.
        """
        hashes: dict[str, str] = {}
        return {str(arm.key): _fingerprint(arm, hashes) for arm in self.arms}


def episodes(tasks: tuple[str, ...] | list[str], seeds: range | list[int]) -> tuple[Episode, ...]:
    """Every task from every seed."""
    return tuple(Episode(task, seed) for task in tasks for seed in seeds)


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a name in `ENVIRONMENTS` or behind "module:function".

    Raises:
        ConfigError: there is no such function.
    """
    module, _, name = ENVIRONMENTS.get(target, target).partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {target!r} ({error}); known: {', '.join(ENVIRONMENTS)}, "
            "or module:function"
        ) from error
    return function


def _fingerprint(arm: Arm, hashes: dict[str, str]) -> dict[str, str]:
    found = {"backend": arm.backend, "device": arm.device}
    # What is not set is not in the fingerprint: results files from before it could be stay valid.
    if arm.act_bits is not None:
        found["act_bits"] = str(arm.act_bits)
    if arm.settings:
        found["settings"] = json.dumps(arm.settings, sort_keys=True)
    if arm.tokenizer is not None:
        found["tokenizer"] = _tree_digest(Path(arm.tokenizer), hashes)
    checkpoint = Path(arm.checkpoint)
    if not checkpoint.exists():
        raise EvaluationError(f"arm {arm.key}: no checkpoint at {checkpoint}")
    found["checkpoint"] = _tree_digest(checkpoint, hashes)
    if arm.pack is not None:
        if not Path(arm.pack).is_file():
            raise EvaluationError(f"arm {arm.key}: no pack at {arm.pack}")
        found["pack"] = _file_digest(Path(arm.pack), hashes)
    return found


def _tree_digest(root: Path, hashes: dict[str, str]) -> str:
    """SHA-256 over the names and contents of a file or of all files of a folder."""
    files = [root]
    if root.is_dir():
        files = sorted(path for path in root.rglob("*") if path.is_file())
    return _digest(
        f"{path.relative_to(root) if path != root else path.name}={_file_digest(path, hashes)}"
        for path in files
    )


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path, hashes: dict[str, str]) -> str:
    key = str(path.resolve())
    if key not in hashes:
        with path.open("rb") as stream:
            hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes[key]
