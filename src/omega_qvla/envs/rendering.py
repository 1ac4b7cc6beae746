"""Meta-World's scenes through mujoco's renderer, lean enough for a CPU."""

from __future__ import annotations

import ctypes.util
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from omega_qvla.errors import EnvError

#: Camera name -> the simulator's camera.
CAMERAS: Mapping[str, str] = MappingProxyType({"base": "corner2", "wrist": "gripperPOV"})
#: As shipped, `corner2` hangs upside down and far off. Here it stands closer, upright, and
#: looks at the middle of where hands and handles go, so that 80 pixels are enough.
#: Metres, world frame; degrees.
_BASE_CAMERA_POSITION = (0.75, 0.075, 0.7)
_BASE_CAMERA_TARGET = (0.0, 0.68, 0.17)
_BASE_CAMERA_FIELD_OF_VIEW = 48.0
#: Half of the scene's triangles: unseen by the wrist, 0.6 % of the base image at its edge.
_HIDDEN_BODIES = ("head", "pedestal", "right_arm_base_link", "right_l0", "right_l1")
_HIDDEN_GEOM_GROUP = 5


def choose_gl() -> str | None:
    """The headless GL backend that `import_mujoco` takes here; None if there is none.

    A value set by the user wins. Without a GPU OSMesa comes first: same speed, and it needs
    no device files.
    """
    if "MUJOCO_GL" in os.environ:
        return os.environ["MUJOCO_GL"]
    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/dri").exists()
    libraries = {"egl": "EGL", "osmesa": "OSMesa"}
    order = ("egl", "osmesa") if has_gpu else ("osmesa", "egl")
    found = (name for name in order if ctypes.util.find_library(libraries[name]))
    return next(found, None)


def import_mujoco() -> Any:
    """Import mujoco with a headless GL backend that this machine has, see `choose_gl`.

    mujoco reads MUJOCO_GL once, at import, and its default wants a display: without one
    the process aborts at the first image.
    """
    if "MUJOCO_GL" not in os.environ:
        chosen = choose_gl()
        if chosen is None:
            raise EnvError(
                "no headless OpenGL found: install libOSMesa or libEGL, or set MUJOCO_GL"
            )
        os.environ["MUJOCO_GL"] = chosen
        # One process per core is how episodes run in parallel; a rasterizer's thread
        # pool per process on top of it only makes them wait for each other.
        os.environ.setdefault("LP_NUM_THREADS", "1")
        if "mujoco" in sys.modules:  # imported by somebody else, with the default
            importlib.reload(importlib.import_module("mujoco.gl_context"))
    return importlib.import_module("mujoco")


def set_up_scene(model: Any) -> None:
    """Aim the base camera, and leave out the parts of the robot that hardly show."""
    mujoco = import_mujoco()
    position = np.array(_BASE_CAMERA_POSITION)
    backward = position - np.array(_BASE_CAMERA_TARGET)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    camera = model.camera(CAMERAS["base"]).id
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    model.cam_pos[camera] = position
    model.cam_quat[camera] = quaternion
    model.cam_fovy[camera] = _BASE_CAMERA_FIELD_OF_VIEW
    for name in _HIDDEN_BODIES:
        body = model.body(name)
        first = int(body.geomadr[0])
        model.geom_group[first : first + int(body.geomnum[0])] = _HIDDEN_GEOM_GROUP


@functools.cache
def scene_options() -> Any:
    """No site markers: the goal spheres exist in the simulator only, not on a table."""
    options = import_mujoco().MjvOption()
    options.sitegroup[:] = 0
    return options


def lean_renderer(model: Any, size: int) -> Any:
    """A renderer without what costs time and tells a policy nothing.

    No shadows, reflections, haze, sky or multisampling, and a buffer of the image's
    size: about 5 ms for both cameras on one CPU core instead of 14.
    """
    mujoco = import_mujoco()
    # Read by the rendering context when it is made, hence set here and each time.
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    renderer = mujoco.Renderer(model, size, size)
    for flag in ("SHADOW", "REFLECTION", "HAZE", "SKYBOX"):
        renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
    return renderer
