"""An evaluation as a value: who plays what, how; and what must not change in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from omega_qvla.errors import ConfigError
from omega_qvla.evaluation import policies
from omega_qvla.evaluation.environment import gl_backend, versions
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
    env_options:    keyword arguments of that function (JSON values). Where it is a class
                    with a classmethod `fingerprint(**env_options) -> dict`, results hold
                    that instead: paths are no part of what was measured.
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
        fingerprint = getattr(resolve(self.env), "fingerprint", dict)
        return {
            "protocol": asdict(self.protocol),
            "env": self.env,
            "env_options": fingerprint(**self.env_options),
            "versions": versions(self.env),
            "gl": gl_backend(),
        }

    def arm_fingerprints(self) -> dict[str, dict[str, str]]:
        """Per arm: what its results depend on, see `arm_fingerprint`."""
        hashes: dict[str, str] = {}
        return {str(arm.key): policies.arm_fingerprint(arm, self.env, hashes) for arm in self.arms}

    def to_dict(self) -> dict[str, Any]:
        """How to play it again: arms with their paths, environment, loader. JSON-ready."""
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "env": self.env,
            "env_options": dict(self.env_options),
            "loader": self.loader,
        }


def episodes(tasks: tuple[str, ...] | list[str], seeds: range | list[int]) -> tuple[Episode, ...]:
    """Every task from every seed."""
    return tuple(Episode(task, seed) for task in tasks for seed in seeds)


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a name in `ENVIRONMENTS` or behind "module:function".

    Raises:
        ConfigError: there is no such function.
    """
    return policies.resolve(target, ENVIRONMENTS)
