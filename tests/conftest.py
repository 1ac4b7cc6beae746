"""Options and settings that every test needs, wherever pytest is started from."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        action="append",
        default=None,
        metavar="DIR",
        help="directory of recorded conformance cases (NAME.json + NAME.safetensors); may be "
        "given several times; default: the small cases in tests/data/conformance",
    )
    parser.addoption(
        "--libero-assets",
        default=None,
        metavar="DIR",
        help="LIBERO's assets for the tests marked `libero`; default: where hf-libero puts them",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Test processes run side by side (xdist); more threads each would only fight.
    torch.set_num_threads(1)
