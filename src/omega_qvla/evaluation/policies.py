"""How an arm becomes a policy, and what tells two arms of one name apart."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omega_qvla.errors import ConfigError, EvaluationError
from omega_qvla.evaluation.records import Arm

#: What may act instead of a checkpoint (`Arm.policy`): a function that takes the arm.
POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "random": "omega_qvla.evaluation.scripted:random_policy",
        "served": "omega_qvla.evaluation.remote:served_policy",
    }
)
#: Environment -> the function that makes its oracle: it takes the environment and returns an
#: `omega_qvla.evaluation.scripted.Oracle`.
ORACLES: Mapping[str, str] = MappingProxyType(
    {
        "metaworld": "omega_qvla.evaluation.scripted:metaworld_oracle",
        "libero": "omega_qvla.envs.libero_oracle:oracle",
    }
)


def resolve(target: str, known: Mapping[str, str]) -> Callable[..., Any]:
    """The function behind a name in `known` or behind "module:function".

    Raises:
        ConfigError: there is no such function.
    """
    module, _, name = known.get(target, target).partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {target!r} ({error}); known: {', '.join(known)}, or module:function"
        ) from error
    return function


def load_policy(arm: Arm, env: str, loader: str) -> Any:
    """What acts for `arm`.

    A policy with `infer(observation, seed=...)`, or an
    `omega_qvla.evaluation.scripted.SimulatorPolicy`.

    Args:
        env, loader: those of the plan.

    Raises:
        ConfigError: the arm names a policy that does not exist, or the environment has no
            oracle.
    """
    if arm.policy is None:
        return resolve(loader, {})(arm)
    if arm.policy == "oracle":
        from omega_qvla.evaluation.scripted import OraclePolicy

        return OraclePolicy(resolve(_oracle(env), {}))
    return resolve(arm.policy, POLICIES)(arm)


def is_local(arm: Arm) -> bool:
    """Whether the arm acts in the process of its simulator: it needs no accelerator."""
    return arm.policy is not None


def arm_fingerprint(arm: Arm, env: str, hashes: dict[str, str]) -> dict[str, str]:
    """What the arm's results depend on: equal fingerprints, equal arms.

    Contents, not paths: a results file stays valid when a directory moves, and does not
    when a pack is rebuilt differently under the same name. Of a scripted policy, the
    SHA-256 of the module that it is written in; of a served one, what its server says
    about itself.

    Args:
        hashes: digests of files by path, shared by the arms of one plan.

    Raises:
        EvaluationError: a file is missing, or the server does not answer.
    """
    if arm.policy == "served":
        from omega_qvla.evaluation.remote import server_metadata

        return {"policy": "served", "server": _digest([_canonical(server_metadata(arm))])}
    if arm.policy is not None:
        target = _oracle(env) if arm.policy == "oracle" else arm.policy
        source = inspect.getsourcefile(resolve(target, POLICIES))
        if source is None:
            raise EvaluationError(f"arm {arm.key}: the policy {target!r} has no source file")
        return {"policy": arm.policy, "source": file_digest(Path(source), hashes)}
    found = {"backend": arm.backend, "device": arm.device}
    # What is not set is not in the fingerprint: results files from before it could be stay valid.
    if arm.act_bits is not None:
        found["act_bits"] = str(arm.act_bits)
    if arm.settings:
        found["settings"] = json.dumps(arm.settings, sort_keys=True)
    if arm.tokenizer is not None:
        found["tokenizer"] = tree_digest(Path(arm.tokenizer), hashes)
    if not Path(arm.checkpoint).exists():
        raise EvaluationError(f"arm {arm.key}: no checkpoint at {arm.checkpoint}")
    found["checkpoint"] = tree_digest(Path(arm.checkpoint), hashes)
    if arm.pack is not None:
        if not Path(arm.pack).is_file():
            raise EvaluationError(f"arm {arm.key}: no pack at {arm.pack}")
        found["pack"] = file_digest(Path(arm.pack), hashes)
    return found


def tree_digest(root: Path, hashes: dict[str, str]) -> str:
    """SHA-256 over the names and contents of a file or of all files of a folder."""
    files = [root]
    if root.is_dir():
        files = sorted(path for path in root.rglob("*") if path.is_file())
    return _digest(
        f"{path.relative_to(root) if path != root else path.name}={file_digest(path, hashes)}"
        for path in files
    )


def file_digest(path: Path, hashes: dict[str, str]) -> str:
    """SHA-256 of a file, remembered in `hashes`."""
    key = str(path.resolve())
    if key not in hashes:
        with path.open("rb") as stream:
            hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes[key]


def _oracle(env: str) -> str:
    if env not in ORACLES:
        raise ConfigError(
            f"the environment {env!r} has no oracle; those that have: {', '.join(ORACLES)}"
        )
    return ORACLES[env]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
