"""LIBERO's files: the package, its assets, its tasks, and its initial states made safe."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.envs.libero_protocol import SUITES
from omega_qvla.envs.rendering import import_mujoco
from omega_qvla.errors import EnvError
from omega_qvla.files import atomic_file

#: Written by whoever replaced assets: one path per line, relative to the assets.
SUBSTITUTES = "substitutes.txt"
_ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "turbosquid_objects")


def libero_root() -> Path:
    """Folder of the installed benchmark: task definitions, initial states, perhaps assets.

    Raises:
        EnvError: hf-libero is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "libero" / "bddl_files").is_dir():
            return Path(place) / "libero"
    raise EnvError("LIBERO is not installed: pip install 'omega-qvla[libero]' (docs/libero.md)")


def find_assets(given: str | Path | None = None) -> Path:
    """The assets' folder: `given` (or `given`/assets), else where hf-libero puts them.

    Raises:
        EnvError: there are none; says where to get them.
    """
    if given is not None:
        places = [Path(given), Path(given) / "assets"]
    else:
        places = [libero_root() / "assets", Path.home() / ".cache" / "libero" / "assets"]
    for place in places:
        if all((place / name).is_dir() for name in _ASSET_FOLDERS):
            return place.resolve()
    raise EnvError(
        f"no LIBERO assets at {' or '.join(map(str, places))}: download them on a machine with a "
        'network (python -c "from libero.libero import get_assets_path as get; print(get())"), '
        "or give the path of a copy"
    )


def has_substitutes(assets: Path) -> bool:
    """Whether files of these assets are not LIBERO's own, so that pictures differ."""
    return (assets / SUBSTITUTES).is_file() or (assets.parent / SUBSTITUTES).is_file()


@contextlib.contextmanager
def _config_for_import() -> Iterator[None]:
    """LIBERO's package asks questions on the terminal if it finds no config file."""
    before = os.environ.get("LIBERO_CONFIG_PATH")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text("{}\n", encoding="utf-8")
        os.environ["LIBERO_CONFIG_PATH"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["LIBERO_CONFIG_PATH"]
            else:
                os.environ["LIBERO_CONFIG_PATH"] = before


def import_libero(assets: Path) -> Any:
    """LIBERO's module of environments, reading `assets`.

    Raises:
        EnvError: LIBERO or something that it imports is missing.
    """
    libero_root()
    import_mujoco()  # chooses the GL backend, which robosuite would choose otherwise
    try:
        with _config_for_import():
            package = importlib.import_module("libero.libero")
            package.__dict__["_assets_path_cache"] = str(assets)
            return importlib.import_module("libero.libero.envs")
    except ImportError as error:
        raise EnvError(
            f"LIBERO does not import ({error}): pip install 'omega-qvla[libero]' (docs/libero.md)"
        ) from error


@cache
def task_names(suite: str) -> tuple[str, ...]:
    """A suite's tasks in the benchmark's order, without importing the simulator.

    Raises:
        EnvError: there is no such suite, or LIBERO is not installed.
    """
    if suite not in SUITES:
        raise EnvError(f"unknown LIBERO suite {suite!r}; known: {', '.join(SUITES)}")
    path = libero_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.libero_task_map[suite])


def suite_tasks(suite: str) -> tuple[str, ...]:
    """The suite's tasks as `LiberoEnv` and results name them: "suite/task"."""
    return tuple(f"{suite}/{name}" for name in task_names(suite))


def split_task(task: str) -> tuple[str, str]:
    """(suite, name) of "suite/name" or "suite/index".

    Raises:
        EnvError: there is no such task.
    """
    suite, _, name = task.partition("/")
    names = task_names(suite)
    if name.isdecimal() and int(name) < len(names):
        return suite, names[int(name)]
    if name not in names:
        raise EnvError(f"unknown task {task!r}; known in {suite}: {', '.join(names)}")
    return suite, name


def language(name: str) -> str:
    """The instruction, from the task's name as the benchmark does it."""
    if name[0].isupper():  # KITCHEN_SCENE3_turn_on_the_stove
        name = name.split("SCENE", 1)[1].split("_", 1)[1]
    return name.replace("_", " ")


def read_pickled_states(data: bytes, source: str) -> np.ndarray:
    """The array in one of LIBERO's .pruned_init files, float64 [states, 1 + nq + nv].

    torch's restricted unpickler, and of all callables only those that rebuild a plain
    array: a file that wants anything else run is refused.

    Raises:
        EnvError: the file is something else.
    """
    import torch

    multiarray = importlib.import_module("numpy._core.multiarray")
    allowed: list[Any] = [
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            states = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise EnvError(f"{source}: not LIBERO's initial states ({error})") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        raise EnvError(f"{source}: initial states must be one float64 matrix")
    if not np.isfinite(states).all():
        raise EnvError(f"{source}: initial states are not finite")
    return states


def initial_states(suite: str, name: str, converted: str | Path | None = None) -> np.ndarray:
    """A task's shipped initial states, float64 [states, 1 + nq + nv].

    converted: folder written by `convert_initial_states`; None reads the package's own files.

    Raises:
        EnvError: the file is missing or unreadable.
    """
    if converted is not None:
        from safetensors.numpy import load_file

        path = Path(converted) / f"{suite}.safetensors"
        try:
            states: np.ndarray = load_file(path)[name]
        except (OSError, KeyError) as error:
            raise EnvError(f"{path}: no initial states of {name} ({error})") from error
        return states
    path = libero_root() / "init_files" / suite / f"{name}.pruned_init"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvError(f"cannot read the initial states {path}: {error}") from error
    return read_pickled_states(data, str(path))


def convert_initial_states(suite: str, folder: str | Path) -> Path:
    """Write a suite's initial states as `folder`/`suite`.safetensors, one tensor per task."""
    from safetensors.numpy import save

    tensors = {name: initial_states(suite, name) for name in task_names(suite)}
    path = Path(folder) / f"{suite}.safetensors"
    with atomic_file(path, parents=True) as stream:
        stream.write(save(tensors))
    return path
