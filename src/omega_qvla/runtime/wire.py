"""Observations and actions as openpi sends them: msgpack with arrays, in its LIBERO names.

Format of openpi's `openpi_client.msgpack_numpy` (Apache-2.0): an array is a map with the
binary keys `__ndarray__`, `data`, `dtype`, `shape`. Arrays of objects do not exist, so
reading a message runs nobody's code.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from omega_qvla.errors import BackendError, ObservationError
from omega_qvla.policies.observation import Observation

STATE, PROMPT, ACTIONS = "observation/state", "prompt", "actions"
#: Ours: the seed of the noise and the number of denoising steps. A server that knows them
#: says so in its metadata, under SEEDED.
SEED, NUM_STEPS, SEEDED = "omega_qvla/seed", "omega_qvla/num_steps", "omega_qvla/seeded"


def image_key(camera: str) -> str:
    """The name of a camera's image: base is `observation/image`, as openpi's LIBERO has it."""
    return "observation/image" if camera == "base" else f"observation/{camera}_image"


def observation_message(observation: Observation) -> dict[str, Any]:
    """What a client sends."""
    images = {image_key(name): np.asarray(image) for name, image in observation.images.items()}
    return {**images, STATE: np.asarray(observation.state), PROMPT: observation.prompt}


def read_observation(message: Mapping[str, Any], cameras: tuple[str, ...]) -> Observation:
    """The observation in a client's message; whether it fits is for the policy to say.

    Raises:
        ObservationError: the message lacks a camera, the state or the prompt, or has
            something else in its place.
    """
    wanted = [*map(image_key, cameras), STATE, PROMPT]
    missing = [key for key in wanted if key not in message]
    if missing:
        raise ObservationError(
            f"the observation lacks {', '.join(missing)}; it has {', '.join(map(str, message))}"
        )
    for key in wanted[:-1]:
        if not isinstance(message[key], np.ndarray):
            raise ObservationError(f"{key} must be an array, not {type(message[key]).__name__}")
    if message[STATE].dtype.kind not in "biuf":
        raise ObservationError(f"{STATE} must be numbers, not {message[STATE].dtype}")
    if not isinstance(message[PROMPT], str):
        raise ObservationError(f"{PROMPT} must be text, not {type(message[PROMPT]).__name__}")
    images = {name: message[image_key(name)] for name in cameras}
    return Observation(images, message[STATE].astype(np.float32), message[PROMPT])


def pack(message: Mapping[str, Any]) -> bytes:
    """Encode. Raises ObservationError for an array that cannot be sent."""
    data: bytes = _msgpack().packb(message, default=_encode)
    return data


def unpack(data: bytes) -> dict[str, Any]:
    """Decode; arrays are copies, and writable.

    Raises:
        ObservationError: this is no message, or an array in it is not what it claims.
    """
    try:
        message = _msgpack().unpackb(data, object_hook=_decode)
    except ObservationError:
        raise
    except Exception as error:  # msgpack has a dozen classes for broken bytes
        raise ObservationError(
            f"{len(data)} bytes that are no msgpack message ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(message, dict):
        raise ObservationError(f"a message must be a map, not {type(message).__name__}")
    return message


def import_websockets(module: str) -> Any:
    """A module of `websockets`. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module(f"websockets.{module}")
    except ImportError as error:
        raise BackendError(
            f"served policies need websockets ({error}): pip install 'omega-qvla[serve]'"
        ) from error


def _msgpack() -> Any:
    try:
        return importlib.import_module("msgpack")
    except ImportError as error:
        raise BackendError(
            f"served policies need msgpack ({error}): pip install 'omega-qvla[serve]'"
        ) from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "VOc":
            raise ObservationError(f"an array of {value.dtype} cannot be sent")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise ObservationError(f"{type(value).__name__} cannot be sent")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    try:
        dtype = np.dtype(value[b"dtype"])
        if dtype.kind in "VOc":
            raise ObservationError(f"an array of {dtype} is not accepted")
        if b"__npgeneric__" in value:
            return dtype.type(value[b"data"])
        shape = tuple(int(length) for length in value[b"shape"])
        data = value[b"data"]
        if min(shape, default=0) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
            raise ObservationError(
                f"an array of {dtype} claims the shape {shape} and comes with {len(data)} bytes"
            )
        return np.frombuffer(data, dtype).reshape(shape).copy()
    except (KeyError, TypeError, ValueError) as error:
        raise ObservationError(f"a broken array in the message: {error}") from error
