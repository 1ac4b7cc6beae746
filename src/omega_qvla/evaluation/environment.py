"""What the numbers were measured on."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import platform
from pathlib import Path

#: Distributions whose version can change a result.
_PACKAGES = ("torch", "numpy", "mujoco", "metaworld")


def environment() -> dict[str, str]:
    """Software and hardware of this process, name -> value, nothing imported for it.

    Keys: python, torch, numpy, mujoco, metaworld ("not installed" where missing),
    gl (OpenGL backend of the simulator's renderer), cpu, cores, threads, platform.
    """
    return {**versions(), "gl": _gl(), **_machine()}


def versions() -> dict[str, str]:
    """Versions that make results comparable or not: mixing them in one file is refused."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
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


def _gl() -> str:
    """The backend in use, or the headless ones this machine offers."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen:
        return chosen
    libraries = {"osmesa": "OSMesa", "egl": "EGL"}
    offered = [name for name, library in libraries.items() if ctypes.util.find_library(library)]
    return f"available: {', '.join(offered)}" if offered else "none"
