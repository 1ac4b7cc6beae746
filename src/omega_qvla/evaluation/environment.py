"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from omega_qvla.envs.rendering import choose_gl

#: Distributions whose version can change a result, beside those of the simulator.
_PACKAGES = ("torch", "numpy", "mujoco")
_SIMULATORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"metaworld": ("metaworld",), "libero": ("robosuite", "hf-libero", "bddl")}
)


def environment(env: str = "metaworld") -> dict[str, str]:
    """Software and hardware of this process, name -> value, nothing imported for it.

    Keys: those of `versions`, gl, cpu, cores, threads, platform.
    """
    return {**versions(env), "gl": gl_backend(), **_machine()}


def gl_backend() -> str:
    """What the simulator's renderer draws with; other pixels make other episodes."""
    return choose_gl() or "none"


def versions(env: str = "metaworld") -> dict[str, str]:
    """Versions that make results comparable or not: mixing them in one file is refused.

    Keys: python, torch, numpy, mujoco, and what simulates `env`, "not installed" where
    missing.
    """
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_SIMULATORS.get(env, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
