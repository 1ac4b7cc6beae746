"""A websocket server that speaks openpi's protocol: its clients need no change.

On connecting, a client is sent the metadata; then every message is an observation and is
answered by `{"actions": float32 [H, action_dim], "server_timing": {"infer_ms": ...}}`, or by
a line of text that says what is wrong. GET /healthz answers OK.
"""

from __future__ import annotations

import asyncio
import http
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from omega_qvla.errors import BackendError, ObservationError, OmegaError
from omega_qvla.policies.base import check_actions
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime import wire
from omega_qvla.runtime.recorder import RecordedEpisode, Recorder

#: Two cameras of 1080p and some: more than that is a mistake, or an attack.
MAX_MESSAGE_BYTES = 32 * 2**20
#: Requests are answered one after another: a client that asks for a million steps is
#: everybody's stop. Policies are trained for 4 to 10.
MAX_NUM_STEPS = 1000
_INTERNAL_ERROR = 1011


class Served(Protocol):
    """What the server needs of a policy (or an `Engine.policy`)."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names that `Observation.images` must have."""
        ...

    def infer(self, observation: Observation, *, seed: int = 0) -> np.ndarray:
        """One chunk, float32 [H, action_dim]."""
        ...


class PolicyServer:
    """Serves one policy; requests are answered one after another, whoever sent them.

    Inference runs in a thread of its own, so that connecting, health checks and other
    clients' messages are answered meanwhile.
    """

    def __init__(
        self,
        policy: Served,
        metadata: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            metadata: what clients are told, see `describe`.
            host: interface to listen on. Nobody is asked who they are: anything but this
                machine's own (the default) belongs behind something that does.
            port: 0 takes a free one.
            recorder: keeps every observation that was answered and its chunk; each connection
                begins an episode. It never holds up an answer. Who gives it closes it.
        """
        self._policy, self._host, self._port = policy, host, port
        self._recorder = recorder
        self._metadata = {**(metadata or {}), wire.SEEDED: True}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def serve_forever(self, announce: Callable[[int], None] = lambda port: None) -> None:
        """Serve until interrupted; `announce(port)` is called once clients can connect.

        Raises:
            BackendError: the address cannot be had.
        """
        asyncio.run(self._serve(asyncio.Event(), announce))

    @contextmanager
    def background(self) -> Iterator[int]:
        """Serve from a thread while the block runs; yields the port."""
        started: list[int | BaseException] = []
        ready, stop = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        def announce(port: int) -> None:
            started.append(port)
            ready.set()

        def serve() -> None:
            try:
                loop.run_until_complete(self._serve(stop, announce))
            except BaseException as error:
                started.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        ready.wait()
        if isinstance(started[0], BaseException):
            raise started[0]
        try:
            yield started[0]
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

    async def _serve(self, stop: asyncio.Event, announce: Callable[[int], None]) -> None:
        server = wire.import_websockets("asyncio.server")
        try:
            serving = await server.serve(
                self._handle,
                self._host,
                self._port,
                compression=None,
                max_size=MAX_MESSAGE_BYTES,
                process_request=_health,
            )
        except OSError as error:
            raise BackendError(
                f"cannot listen on {self._host}:{self._port} ({error}): give another --port"
            ) from error
        async with serving:
            announce(serving.sockets[0].getsockname()[1])
            await stop.wait()

    async def _handle(self, connection: Any) -> None:
        closed = wire.import_websockets("exceptions").ConnectionClosed
        episode = None if self._recorder is None else self._recorder.begin()
        try:
            await connection.send(wire.pack(self._metadata))
            async for data in connection:
                try:
                    await connection.send(await self._answer(data, episode))
                except OmegaError as error:  # theirs, or the policy's: the next may be well
                    await connection.send(f"{type(error).__name__}: {error}")
        except closed:
            return
        except Exception as error:
            await connection.send(f"{type(error).__name__}: {error}")
            await connection.close(_INTERNAL_ERROR, "internal error, see the message before")
            raise

    async def _answer(self, data: bytes | str, episode: RecordedEpisode | None) -> bytes:
        if isinstance(data, str):
            raise ObservationError("an observation is a binary message, this one is text")
        message = wire.unpack(data)
        observation = wire.read_observation(message, self._policy.cameras)
        options = _options(message)
        begin = time.perf_counter()
        loop = asyncio.get_running_loop()
        actions = await loop.run_in_executor(
            self._thread, lambda: self._policy.infer(observation, **options)
        )
        check_actions(actions)  # whatever the policy is: nothing else leaves
        elapsed = 1000 * (time.perf_counter() - begin)
        if self._recorder is not None:
            self._recorder.record(observation, actions, episode)
        return wire.pack({wire.ACTIONS: actions, "server_timing": {"infer_ms": elapsed}})


def describe(policy: Any, backend: str, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """Metadata of a policy: what it is, and the hashes of the files it was loaded from."""
    return {
        "server": "omega-qvla",
        "family": policy.family,
        "cameras": list(policy.cameras),
        "action_dim": policy.action_dim,
        "action_horizon": policy.action_horizon,
        "num_steps": policy.num_steps,
        "backend": backend,
        "fingerprint": dict(fingerprint),
    }


def _options(message: Mapping[str, Any]) -> dict[str, int]:
    """Keyword arguments of `infer`. Without a seed the noise is new every time."""
    seed = message.get(wire.SEED)
    if seed is None:
        seed = int(np.random.default_rng().integers(2**32))
    options = {"seed": seed}
    if message.get(wire.NUM_STEPS) is not None:
        options["num_steps"] = message[wire.NUM_STEPS]
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ObservationError(f"{name} must be an integer from 0, not {value!r}")
    if not 1 <= options.get("num_steps", 1) <= MAX_NUM_STEPS:
        raise ObservationError(f"num_steps must be 1 to {MAX_NUM_STEPS}: {options['num_steps']}")
    return options


def _health(connection: Any, request: Any) -> Any:
    if request.path == "/healthz":
        return connection.respond(http.HTTPStatus.OK, "OK\n")
    return None
