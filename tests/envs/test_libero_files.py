"""LIBERO's files and protocols: what is published stays so, and no file runs code."""

from __future__ import annotations

import importlib.util
import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.envs.libero_files import (
    convert_initial_states,
    find_assets,
    has_substitutes,
    initial_states,
    language,
    libero_root,
    read_pickled_states,
    split_task,
    suite_tasks,
    task_names,
)
from omega_qvla.envs.libero_protocol import (
    PROTOCOLS,
    SUITES,
    LiberoProtocol,
    StepCaps,
    libero_protocol,
)
from omega_qvla.errors import ConfigError, EnvError

needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None,
    reason="hf-libero is not installed: pip install 'omega-qvla[libero]'",
)


def torch_zip(pickled: bytes) -> bytes:
    """The container that torch.save puts a pickle in."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    return stream.getvalue()


def test_published_protocols_are_what_was_published() -> None:
    openpi = PROTOCOLS["openpi"]
    assert openpi.caps == StepCaps(220, 280, 300, 520, 400)
    assert (openpi.execute, openpi.settle_steps, openpi.seed, openpi.offset) == (5, 10, 7, 0)
    groot, omega = PROTOCOLS["gr00t-n1.5"], PROTOCOLS["omega-paper"]
    assert (groot.denoising_steps, groot.horizon, groot.execute) == (8, 16, 1)
    assert groot.caps == StepCaps(220, 280, 600, 1000, 400)
    assert (omega.trials, omega.offset) == (10, 10)
    assert {protocol.rendering for protocol in PROTOCOLS.values()} == {"libero"}
    assert {protocol.scene for protocol in PROTOCOLS.values()} == {"trial"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_survives_json(name: str) -> None:
    assert LiberoProtocol.from_dict(PROTOCOLS[name].to_dict()) == libero_protocol(name)


def test_own_protocols_need_their_own_name() -> None:
    own = replace(PROTOCOLS["openpi"], name="mine", settle_steps=0)
    assert libero_protocol(own) == libero_protocol(own.to_dict()) == own
    with pytest.raises(ConfigError, match="give changed settings a new name"):
        libero_protocol(replace(PROTOCOLS["openpi"], settle_steps=0))


def test_a_protocol_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("name: mine\ncamera_size: 80\ncaps: {libero_10: 700}\n")
    own = libero_protocol(str(path))
    assert own == libero_protocol(path)
    assert (own.name, own.camera_size, own.caps.libero_10) == ("mine", 80, 700)
    assert own.caps.libero_goal == 300  # what is left out is openpi's
    path.write_text("name: openpi\nsettle_steps: 0\n")
    with pytest.raises(ConfigError, match="give changed settings a new name"):
        libero_protocol(path)


@pytest.mark.parametrize("text", ["- a list", "just words", "name: [", ""])
def test_a_file_that_is_no_protocol_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        libero_protocol(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        libero_protocol(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope", "known: openpi"),
        ({"name": "x", "scene": "every"}, "scene must be trial or seed"),
        ({"name": "x", "rendering": "pretty"}, "rendering must be libero or fast"),
        ({"name": "x", "setle": 1}, "setle"),
        ({"name": "x", "caps": {"libero_11": 1}}, "libero_11"),
        ({"name": "x", "gripper": "up"}, "gripper"),
        ({"name": "x", "execute": 0}, "execute"),
        ({"name": "x", "caps": {"libero_10": 0}}, "caps"),
        ({"execute": 1}, "needs a name"),
    ],
)
def test_a_bad_protocol_is_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        libero_protocol(given)  # type: ignore[arg-type]


def test_missing_assets_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="get_assets_path"):
        find_assets(tmp_path)


def test_assets_are_found_beside_the_list_of_substitutes(tmp_path: Path) -> None:
    for name in ("articulated_objects", "scenes", "stable_hope_objects", "turbosquid_objects"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    found = find_assets(tmp_path)
    assert found == (tmp_path / "assets").resolve()
    assert not has_substitutes(found)
    (tmp_path / "substitutes.txt").write_text("textures/gray_wall.png\n")
    assert has_substitutes(found)


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"garbage",
    ],
)
def test_a_pickle_that_wants_to_run_something_is_refused(
    pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvError, match="not LIBERO's initial states"):
        read_pickled_states(torch_zip(pickled), "bad.pruned_init")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("put_the_bowl_on_the_stove", "put the bowl on the stove"),
        ("KITCHEN_SCENE3_turn_on_the_stove", "turn on the stove"),
        ("KITCHEN_SCENE10_close_the_top_drawer", "close the top drawer"),
    ],
)
def test_the_instruction_comes_from_the_name(name: str, words: str) -> None:
    assert language(name) == words


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(EnvError, match=r"libero_11.*known: libero_spatial"):
        task_names("libero_11")


def test_without_libero_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError, match=r"omega-qvla\[libero\]"):
        libero_root()


@needs_libero
@pytest.mark.libero
def test_all_suites_have_their_tasks_and_instructions() -> None:
    assert {suite: len(suite_tasks(suite)) for suite in SUITES} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    name = "pick_up_the_cream_cheese_and_place_it_in_the_basket"
    assert split_task("libero_object/1") == ("libero_object", name)
    assert split_task(f"libero_object/{name}") == ("libero_object", name)
    with pytest.raises(EnvError, match="unknown task 'libero_object/10'"):
        split_task("libero_object/10")


@needs_libero
@pytest.mark.libero
@pytest.mark.parametrize("suite", SUITES)
def test_initial_states_are_converted_without_change(suite: str, tmp_path: Path) -> None:
    convert_initial_states(suite, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{suite}.safetensors"]
    for name in task_names(suite):
        states = initial_states(suite, name)
        assert states.shape[0] == 50 and states.shape[1] > 19  # time and a robot with its gripper
        assert len(np.unique(states, axis=0)) > 1
        assert np.array_equal(states, initial_states(suite, name, converted=tmp_path))
