"""Model cards: where the demonstrations and the pictures came from is said, for both simulators."""

from __future__ import annotations

from typing import Any

from omega_qvla.evaluation.records import EpisodeRecord

COUNTS = {"episodes": 3, "steps": 300, "images": 100}
LIBERO = {
    "protocol": {"name": "demonstrations", "camera_size": 256},
    "assets": "substitutes",
    "versions": {"mujoco": "3.3.0"},
    "tasks": {"libero_object/milk": COUNTS},
}
METAWORLD = {
    "size": 80,
    "versions": {"mujoco": "3.3.0"},
    "tasks": {"drawer-open": COUNTS | {"prompt": "open the drawer"}},
}


def episode(seed: int, success: bool) -> EpisodeRecord:
    return EpisodeRecord(
        family="pi05",
        variant="plain",
        arm="full-precision",
        task="libero_object/milk",
        seed=seed,
        success=success,
        steps=100,
        replans=20,
        action_jerk=1.0,
        path_jerk=1.0,
        simulation_s=1.0,
        rendering_s=1.0,
        policy_s=1.0,
    )


def test_substitute_pictures_are_said_and_only_where_they_were_used() -> None:
    from card import data_section

    said = data_section(LIBERO)
    assert "substitutes" in said and "no success rate here is a LIBERO result" in said
    assert "libero_object/milk: 3 demonstrations, 300 steps, 100 of them rendered\n" in said
    assert "rendered in 256 pixels" in said and "mujoco 3.3.0" in said
    own = data_section(LIBERO | {"assets": "original"})
    assert "substitutes" not in own and "LIBERO's own assets" in own


def test_metaworld_has_its_instructions() -> None:
    from card import data_section

    said = data_section(METAWORLD)
    assert '100 of them rendered; instruction "open the drawer"' in said
    assert "Two cameras of 80 pixels" in said and "LIBERO" not in said


def test_success_says_how_it_was_played() -> None:
    from card import success_section

    settings: dict[str, Any] = {"env": "metaworld", "versions": {"mujoco": "3.3.0"}}
    records = [episode(0, True), episode(1, False)]
    assert "Seeds held out from training." in success_section(records, settings)
    options = {"protocol": {"name": "openpi"}, "assets": "substitutes"}
    said = success_section(records, settings | {"env": "libero", "env_options": options})
    assert "| all | 1 of 2 | 50% | 9% to 91% |" in said
    assert "Protocol `openpi`, assets: substitutes." in said
