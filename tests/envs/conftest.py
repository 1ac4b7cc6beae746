"""LIBERO's environments for the tests marked `libero`, which are skipped without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.envs.libero import LiberoEnv
from omega_qvla.envs.libero_files import find_assets, has_substitutes
from omega_qvla.envs.libero_protocol import PROTOCOLS, LiberoProtocol
from omega_qvla.errors import EnvError

Make = Callable[..., LiberoEnv]


@pytest.fixture(scope="session")
def quick() -> LiberoProtocol:
    """openpi's way of playing, with less to render and to wait for."""
    return replace(PROTOCOLS["openpi"], name="quick", camera_size=96, settle_steps=2)


@pytest.fixture(scope="session")
def assets(pytestconfig: pytest.Config) -> Path:
    """Those of --libero-assets, or those that are installed."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install 'omega-qvla[libero]'")
    try:
        return find_assets(pytestconfig.getoption("--libero-assets"))
    except EnvError as error:
        pytest.skip(str(error))


@pytest.fixture
def make(assets: Path, quick: LiberoProtocol) -> Iterator[Make]:
    """Makes environments, of libero_object/0 by default, and closes them after the test."""
    made = []

    def one(task: str = "libero_object/0", **options: Any) -> LiberoEnv:
        options = {"protocol": quick, **options}
        env = LiberoEnv(task, assets=assets, substitutes=has_substitutes(assets), **options)
        made.append(env)
        return env

    yield one
    for env in made:
        env.close()
