"""How LIBERO episodes are played: named, versioned, and stored with every result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from omega_qvla.errors import ConfigError

#: The suites, in the order in which tables list them.
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"scene": ("trial", "seed"), "rendering": ("libero", "fast"), "gripper": ("libero", "open-01")}
)


@dataclass(frozen=True)
class StepCaps:
    """Control steps per suite after which an episode has failed; settling not counted."""

    libero_spatial: int = 220
    libero_object: int = 280
    libero_goal: int = 300
    libero_10: int = 520
    libero_90: int = 400


@dataclass(frozen=True)
class LiberoProtocol:
    """Everything outside the policy that moves a LIBERO success rate.

    name, version: what results say they were made with; a changed setting is a new version.
    caps:          step caps by suite.
    execute:       actions executed of each predicted chunk.
    settle_steps:  no-op actions before the policy sees anything: objects drop on the table.
    seed:          seed of the resets. The shipped initial states hold joint positions only;
                   where fixtures stand is drawn at the reset, so it is part of the protocol.
    scene:         "trial": trial n has the fixtures of the n-th reset after seeding, as in a
                   script that seeds once per task and then resets once per trial (openpi's).
                   "seed": every trial has those of the first reset.
    trials:        episodes per task.
    offset:        the first of the task's shipped initial states that is used.
    camera_size:   edge of both rendered images in pixels.
    rendering:     "libero" renders as LIBERO does; "fast" leaves out shadows, reflections and
                   multisampling, in half the time. The pictures differ, so a published protocol
                   is never "fast".
    rotate:        turn the renderer's raw images, which lie upside down, by 180 degrees. They
                   then are upright and mirrored, which is what LIBERO policies are trained on.
    gripper:       meaning of the last action entry: "libero" (-1 opens, 1 closes, passed on as
                   it is) or "open-01" (a number in [0, 1], 1 opens: sign(1 - 2 g) is executed).
    denoising_steps, horizon: what the policy was run with, None where it decides itself.
    """

    name: str
    version: int = 1
    caps: StepCaps = StepCaps()
    execute: int = 5
    settle_steps: int = 10
    seed: int = 7
    scene: Literal["trial", "seed"] = "trial"
    trials: int = 50
    offset: int = 0
    camera_size: int = 256
    rendering: Literal["libero", "fast"] = "libero"
    rotate: bool = True
    gripper: Literal["libero", "open-01"] = "libero"
    denoising_steps: int | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        least = {"version": 1, "execute": 1, "trials": 1, "camera_size": 1}
        least |= {"settle_steps": 0, "offset": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"LiberoProtocol.{name} must be at least {low}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = " or ".join(choices)
                raise ConfigError(f"LiberoProtocol.{name} must be {known}: {getattr(self, name)!r}")
        if min(asdict(self.caps).values()) < 1:
            raise ConfigError("LiberoProtocol.caps must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, complete: what a results file stores."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LiberoProtocol:
        """Inverse of `to_dict`; settings left out have their defaults.

        Raises:
            ConfigError: a setting is unknown or impossible, or there is no name.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown or "name" not in data:
            raise ConfigError(f"a LIBERO protocol needs a name and has no settings {unknown}")
        try:
            return cls(**{**data, "caps": StepCaps(**data.get("caps", {}))})
        except TypeError as error:
            raise ConfigError(f"LIBERO protocol {data['name']!r}: {error}") from error


#: Isaac-GR00T's own table of caps.
_GROOT_CAPS = StepCaps(libero_goal=600, libero_10=1000)

#: The published ways. `openpi`: its LIBERO example. `gr00t-n1.5`: 8 denoising steps of a
#: chunk of 16, of which one action is executed. `omega-paper`: that for GR00T, on ten initial
#: states from the eleventh on. The scripts of the last two state no seed: 7 is our choice.
PROTOCOLS: Mapping[str, LiberoProtocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            LiberoProtocol("openpi"),
            LiberoProtocol(
                "gr00t-n1.5",
                caps=_GROOT_CAPS,
                execute=1,
                gripper="open-01",
                denoising_steps=8,
                horizon=16,
                trials=5,
            ),
            LiberoProtocol(
                "omega-paper",
                caps=_GROOT_CAPS,
                execute=1,
                gripper="open-01",
                denoising_steps=8,
                horizon=16,
                trials=10,
                offset=10,
            ),
        )
    }
)


def libero_protocol(
    given: str | os.PathLike[str] | Mapping[str, Any] | LiberoProtocol,
) -> LiberoProtocol:
    """A protocol by its published name, or the user's own.

    given: a published name; the path of a YAML file with the settings of `LiberoProtocol`; those
        settings as a mapping; or a protocol.

    Raises:
        ConfigError: there is no such protocol or file, or a published name stands for other
            settings.
    """
    if isinstance(given, str) and given in PROTOCOLS:
        return PROTOCOLS[given]
    if isinstance(given, str | os.PathLike):
        given = _read_yaml(given)
    own = given if isinstance(given, LiberoProtocol) else LiberoProtocol.from_dict(given)
    if own.name in PROTOCOLS and own != PROTOCOLS[own.name]:
        raise ConfigError(f"protocol {own.name!r} is published: give changed settings a new name")
    return own


def _read_yaml(given: str | os.PathLike[str]) -> Mapping[str, Any]:
    path = Path(given)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"unknown LIBERO protocol {str(given)!r}; known: {', '.join(PROTOCOLS)}, or a YAML file"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the LIBERO protocol {path}: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: a LIBERO protocol is a mapping of settings")
    return data
