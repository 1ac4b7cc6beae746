"""omega-qvla: real 4-bit weights and activations for vision-language-action policies.

Importing the package imports nothing heavy; the public names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Engine": "omega_qvla.runtime.engine",
    "Observation": "omega_qvla.policies.observation",
    "OmegaError": "omega_qvla.errors",
    "Recipe": "omega_qvla.config.recipe",
    "Recorder": "omega_qvla.runtime.recorder",
    "attach_pack": "omega_qvla.pack.foreign",
    "apply_pack": "omega_qvla.pack.apply",
    "load_policy": "omega_qvla.policies.registry",
    "load_bundle": "omega_qvla.bundle.reader",
    "merge_packs": "omega_qvla.pack.merge",
    "preset": "omega_qvla.config.presets",
    "quantize_": "omega_qvla.quantize.module",
    "quantize_policy": "omega_qvla.quantize",
    "read_pack": "omega_qvla.pack.reader",
    "resolve_recipe": "omega_qvla.config.presets",
    "verify_pack": "omega_qvla.pack.verify",
    "write_bundle": "omega_qvla.bundle.writer",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'omega_qvla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
