"""The policy server, from the side of clients: ours, openpi's, and broken ones."""

import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from omega_qvla.calibration.sources import ObservationMap, RecordedFolder
from omega_qvla.errors import ActionError, BackendError, EvaluationError
from omega_qvla.evaluation.remote import RemotePolicy
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime import wire
from omega_qvla.runtime.recorder import Recorder
from omega_qvla.serving.server import PolicyServer, describe
from policies.tiny import tiny_observation, tiny_pi05

pytest.importorskip("msgpack", reason="the extra [serve] is not installed")
client = pytest.importorskip("websockets.sync.client", reason="needs the extra [serve]")


class Scripted:
    """Answers as told; waits while `gate` is closed."""

    cameras = ("base",)

    def __init__(self, fault: str = "") -> None:
        self.fault, self.gate = fault, threading.Event()
        self.gate.set()

    def infer(self, observation, *, seed=0, num_steps=None):
        self.gate.wait(20)
        if self.fault == "raises":
            raise RuntimeError("boom")
        chunk = np.full((4, 2), float(seed), np.float32)
        if self.fault == "nan":
            chunk[1, 1] = np.nan
        return chunk


def look() -> Observation:
    return Observation({"base": np.zeros((4, 4, 3), np.uint8)}, np.zeros(2, np.float32), "go")


def address(port: int) -> str:
    return f"ws://127.0.0.1:{port}"


def test_a_served_policy_gives_the_actions_of_the_policy_bit_for_bit():
    policy = tiny_pi05(num_steps=2)
    metadata = describe(policy, "none", {"checkpoint": "x"})
    with PolicyServer(policy, metadata, port=0).background() as p:
        remote = RemotePolicy(address(p))
        assert remote.metadata["family"] == "pi05" and remote.seeded
        for seed in (0, 1, 2**32 - 1):
            seen = tiny_observation(seed % 5)
            expected = policy.infer(seen, seed=seed)
            np.testing.assert_array_equal(remote.infer(seen, seed=seed), expected)
        fewer = remote.infer(seen, seed=3, num_steps=1)
        np.testing.assert_array_equal(fewer, policy.infer(seen, seed=3, num_steps=1))
        assert not np.array_equal(fewer, policy.infer(seen, seed=3))
        remote.close()


def test_openpis_own_client_is_served():
    openpi = pytest.importorskip(
        "openpi_client.websocket_client_policy", reason="openpi-client is not installed"
    )
    policy = tiny_pi05(num_steps=2)
    with PolicyServer(policy, describe(policy, "none", {}), port=0).background() as port:
        theirs = openpi.WebsocketClientPolicy("127.0.0.1", port)
        assert theirs.get_server_metadata()["action_horizon"] == policy.action_horizon
        seen = tiny_observation(0)
        message = wire.observation_message(seen)
        answer = theirs.infer({**message, wire.SEED: 5})
        np.testing.assert_array_equal(answer["actions"], policy.infer(seen, seed=5))
        assert answer["server_timing"]["infer_ms"] > 0
        once, again = (theirs.infer(message)["actions"] for _ in range(2))
        assert once.shape == again.shape and not np.array_equal(once, again)
        with pytest.raises(RuntimeError, match="lacks observation/image"):
            theirs.infer({"prompt": "go"})


def test_non_finite_actions_never_leave():
    with PolicyServer(Scripted("nan"), port=0).background() as port:
        remote = RemotePolicy(address(port))
        with pytest.raises(ActionError, match="step 1, channel 1"):
            remote.infer(look())
        with pytest.raises(ActionError):  # the connection is still there
            remote.infer(look())


def test_bad_requests_are_answered_and_the_next_is_served():
    good = wire.observation_message(look())
    with (
        PolicyServer(Scripted(), port=0).background() as port,
        client.connect(address(port), compression=None) as raw,
    ):
        assert wire.unpack(raw.recv())[wire.SEEDED] is True
        for bad, message in (
            ("text", "binary"),
            (b"\xc1", "no msgpack"),
            (wire.pack({}), "lacks observation/image"),
            (wire.pack({**good, wire.SEED: -1}), "seed must be an integer"),
            (wire.pack({**good, wire.SEED: 1.5}), "seed must be an integer"),
            (wire.pack({**good, wire.NUM_STEPS: 0}), "num_steps must be 1 to"),
            (wire.pack({**good, wire.NUM_STEPS: 10**9}), "num_steps must be 1 to"),
            (wire.pack({**good, wire.STATE: np.array(["up", "down"])}), "must be numbers"),
            (wire.pack({**good, wire.STATE: np.zeros(2, "m8[s]")}), "must be numbers"),
        ):
            raw.send(bad)
            answer = raw.recv()
            assert isinstance(answer, str) and message in answer
        raw.send(wire.pack({**good, wire.SEED: 3}))
        assert wire.unpack(raw.recv())["actions"].tolist() == [[3.0, 3.0]] * 4


def test_an_error_of_the_policy_reaches_the_client_without_its_traceback():
    with PolicyServer(Scripted("raises"), port=0).background() as port:
        remote = RemotePolicy(address(port))
        with pytest.raises(EvaluationError, match=r"answers: RuntimeError: boom$"):
            remote.infer(look())


def test_health_and_other_clients_are_answered_during_inference():
    policy = Scripted()
    with PolicyServer(policy, port=0).background() as port:
        first, second = RemotePolicy(address(port)), None
        policy.gate.clear()
        busy = threading.Thread(target=first.infer, args=(look(),))
        busy.start()
        try:
            url = f"http://127.0.0.1:{port}/healthz"
            assert urllib.request.urlopen(url, timeout=5).read() == b"OK\n"
            second = RemotePolicy(address(port))  # gets its metadata
        finally:
            policy.gate.set()
            busy.join()
        assert second.infer(look(), seed=2)[0, 0] == 2


def test_the_default_is_this_machine_alone_and_a_taken_port_is_named():
    with (
        PolicyServer(Scripted(), port=0).background() as port,
        pytest.raises(BackendError, match=f"cannot listen on 127.0.0.1:{port}"),
        PolicyServer(Scripted(), port=port).background(),
    ):
        pass


def test_a_lost_server_is_named_and_a_restarted_one_goes_on():
    with PolicyServer(Scripted(), {"id": 1}, port=0).background() as port:
        remote = RemotePolicy(address(port))
        assert remote.infer(look(), seed=4)[0, 0] == 4
    with PolicyServer(Scripted(), {"id": 1}, port=port).background():
        assert remote.infer(look(), seed=5)[0, 0] == 5
    with (
        PolicyServer(Scripted(), {"id": 2}, port=port).background(),
        pytest.raises(EvaluationError, match="become another"),
    ):
        remote.infer(look())
    with pytest.raises(EvaluationError, match=r"no policy server at ws.*omega-qvla serve"):
        remote.infer(look())


def test_a_server_records_what_it_answered_an_episode_per_client(tmp_path: Path) -> None:
    policy = tiny_pi05(num_steps=2)
    answers = []
    with (
        Recorder(tmp_path / "r") as recorder,
        PolicyServer(policy, port=0, recorder=recorder).background() as port,
    ):
        for count in (3, 2):
            remote = RemotePolicy(address(port))
            for step in range(count):
                answers.append(remote.infer(tiny_observation(step), seed=step))
            with pytest.raises(EvaluationError):  # not answered, so not recorded
                remote.infer(look(), seed=0)
            remote.close()
    assert recorder.report().lost == 0
    source = RecordedFolder.open(tmp_path / "r", policy.cameras, ObservationMap({}))
    assert [(m.episode, m.step) for m in source.meta] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for found, step in zip(source.take(range(5)), (0, 1, 2, 0, 1), strict=True):
        for camera, image in tiny_observation(step).images.items():
            np.testing.assert_array_equal(found.images[camera], image)
    kept = [load_file(path)["actions"] for path in sorted((tmp_path / "r").glob("*.safetensors"))]
    np.testing.assert_array_equal(np.concatenate(kept), np.stack(answers))


def test_clients_side_by_side_are_episodes_of_their_own(tmp_path: Path) -> None:
    """Steps of two robots in one episode would be a motion that nobody made."""
    policy = tiny_pi05(num_steps=1)
    with (
        Recorder(tmp_path / "r") as recorder,
        PolicyServer(policy, port=0, recorder=recorder).background() as port,
    ):
        robots = [RemotePolicy(address(port)) for _ in range(3)]  # the third never asks
        for step in range(3):
            for robot, remote in enumerate(robots[:2]):
                remote.infer(tiny_observation(10 * robot + step), seed=step)
        for remote in robots:
            remote.close()
    assert (recorder.report().written, recorder.report().lost) == (6, 0)
    source = RecordedFolder.open(tmp_path / "r", policy.cameras, ObservationMap({}))
    order = [(m.episode, m.step) for m in source.meta]
    assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for (robot, step), found in zip(order, source.take(range(6)), strict=True):
        expected = tiny_observation(10 * robot + step)
        np.testing.assert_array_equal(found.state, expected.state)
        for camera, image in expected.images.items():
            np.testing.assert_array_equal(found.images[camera], image)
