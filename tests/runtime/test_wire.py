"""openpi's messages: what goes in comes out, and nothing else comes in."""

import numpy as np
import pytest

from omega_qvla.errors import ObservationError
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime import wire

msgpack = pytest.importorskip("msgpack", reason="the extra [serve] is not installed")


def observation() -> Observation:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    return Observation({"base": image, "wrist": image[::-1]}, np.ones(3, np.float32), "go")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array([np.nan, np.inf, -0.0]),
        np.zeros((0, 3), np.uint8),
        np.array(2.5),
        np.array([True, False]),
        np.arange(6, dtype=">i4")[::2],
    ],
)
def test_arrays_keep_bits_shape_and_type(array):
    back = wire.unpack(wire.pack({"x": {"y": array}}))["x"]["y"]
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


def test_the_bytes_are_those_of_openpi():
    """The format as openpi_client.msgpack_numpy writes it, spelt out."""
    expected = {b"__ndarray__": True, b"data": b"\x01\x02", b"dtype": "|u1", b"shape": [2]}
    sent = wire.pack({"a": np.array([1, 2], np.uint8), "b": np.float32(2)})
    plain = msgpack.unpackb(sent)
    assert plain["a"] == expected
    assert plain["b"] == {b"__npgeneric__": True, b"data": 2.0, b"dtype": "<f4"}
    assert wire.unpack(sent)["b"] == np.float32(2)


def test_an_observation_survives():
    sent = observation()
    message = wire.observation_message(sent)
    assert set(message) == {
        "observation/image", "observation/wrist_image", "observation/state", "prompt"
    }  # fmt: skip
    back = wire.read_observation(wire.unpack(wire.pack(message)), ("base", "wrist"))
    assert back.prompt == "go"
    np.testing.assert_array_equal(back.state, sent.state)
    for name in sent.images:
        np.testing.assert_array_equal(back.images[name], sent.images[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation/wrist_image": None}, "wrist_image must be an array"),
        ({"prompt": 3}, "prompt must be text"),
        ({"observation/state": [1, 2]}, "state must be an array"),
    ],
)
def test_a_message_of_the_wrong_kind_is_named(change, message):
    sent = {**wire.observation_message(observation()), **change}
    with pytest.raises(ObservationError, match=message):
        wire.read_observation(sent, ("base", "wrist"))


def test_a_missing_camera_is_named_with_what_there_is():
    sent = wire.observation_message(observation())
    with pytest.raises(ObservationError, match=r"lacks observation/left_image; it has obs"):
        wire.read_observation(sent, ("base", "left"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb([1, 2]),
        msgpack.packb({"a": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4"}}),
        msgpack.packb({"a": {b"__ndarray__": True, b"data": b"1", b"dtype": "|O", b"shape": [1]}}),
        msgpack.packb(
            {"a": {b"__ndarray__": True, b"data": b"1", b"dtype": "<f4", b"shape": [2**40]}}
        ),
        msgpack.packb({"a": {b"__ndarray__": True, b"data": b"1", b"dtype": "xx", b"shape": [1]}}),
        msgpack.packb(
            {"a": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [-1]}}
        ),
    ],
)
def test_broken_messages_are_refused(data):
    with pytest.raises(ObservationError):
        wire.unpack(data)


def test_objects_cannot_be_sent():
    with pytest.raises(ObservationError, match="object"):
        wire.pack({"a": np.array([{}])})
    with pytest.raises(ObservationError, match="set"):
        wire.pack({"a": {1}})
