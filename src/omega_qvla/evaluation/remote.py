"""A policy that is served elsewhere, asked over openpi's websocket protocol."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from omega_qvla.errors import ActionError, EvaluationError
from omega_qvla.evaluation.records import Arm
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime import wire

_CONNECT_S = 30.0


class RemotePolicy:
    """Client of a policy server: ours, or openpi's own.

    Images go over as they are; the server resizes them as it would in process. Ours takes
    the seed of the noise along and answers what the policy in this process would; openpi's
    draws its own noise, and its episodes cannot be repeated.

    Attributes:
        metadata: what the server says about itself.
        seeded: whether it takes seeds.
    """

    def __init__(self, address: str) -> None:
        """Connect to "ws://host:port". Raises EvaluationError: nobody serves there."""
        self._address = address
        self._open = ExitStack()
        self._connection: Any = None
        self.metadata: dict[str, Any] = {}
        self._connect()

    @property
    def seeded(self) -> bool:
        """Whether the server takes seeds."""
        return bool(self.metadata.get(wire.SEEDED))

    def infer(
        self, observation: Observation, *, seed: int = 0, num_steps: int | None = None
    ) -> np.ndarray:
        """One chunk, float32 [H, action_dim].

        Raises:
            ActionError: the policy produced a non-finite action.
            EvaluationError: the server refused the observation, has no such options, or is gone.
        """
        message = wire.observation_message(observation)
        if self.seeded:
            message[wire.SEED] = seed
        if num_steps is not None:
            if not self.seeded:
                raise EvaluationError(
                    f"the server at {self._address} decides on its denoising steps itself: use a "
                    "protocol that leaves them out"
                )
            message[wire.NUM_STEPS] = num_steps
        answer = self._ask(wire.pack(message))
        if isinstance(answer, str):
            kind, _, text = answer.partition(": ")
            if kind == ActionError.__name__:
                raise ActionError(text)
            raise EvaluationError(f"the server at {self._address} answers: {answer}")
        actions = wire.unpack(answer).get(wire.ACTIONS)
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
            raise EvaluationError(f"the server at {self._address} sent no array of actions")
        return actions.astype(np.float32)

    def close(self) -> None:
        """Disconnect."""
        self._open.close()

    def _connect(self) -> None:
        client = wire.import_websockets("sync.client")
        self._open.close()
        try:
            self._connection = self._open.enter_context(
                client.connect(
                    self._address, compression=None, max_size=None, open_timeout=_CONNECT_S
                )
            )
            self.metadata = wire.unpack(self._connection.recv(timeout=_CONNECT_S))
        except Exception as error:  # refused, not found, no websocket, no metadata
            raise EvaluationError(
                f"no policy server at {self._address} ({type(error).__name__}: {error}): start one "
                "with `omega-qvla serve CHECKPOINT`, or openpi's scripts/serve_policy.py"
            ) from error

    def _ask(self, data: bytes) -> bytes | str:
        """Send and wait; once more over a new connection where the old one broke."""
        closed = wire.import_websockets("exceptions").ConnectionClosed
        before = self.metadata
        for last in (False, True):
            try:
                self._connection.send(data)
                answer: bytes | str = self._connection.recv()
                return answer
            except closed as error:
                if last:
                    raise EvaluationError(f"the server at {self._address} went away") from error
                self._connect()
                if self.metadata != before:
                    raise EvaluationError(
                        f"the server at {self._address} has become another one: {self.metadata}"
                    ) from error
        raise AssertionError("unreachable")


def served_policy(arm: Arm) -> RemotePolicy:
    """The policy "served" of an arm, whose checkpoint is the server's address."""
    return RemotePolicy(arm.checkpoint)


def server_metadata(arm: Arm) -> dict[str, Any]:
    """What the server of an arm says about itself. Raises EvaluationError: there is none."""
    policy = served_policy(arm)
    policy.close()
    return policy.metadata
