"""What the tests of the native kernels share."""

from __future__ import annotations

import pytest

from .natives import ISAS


@pytest.fixture(params=ISAS or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn; a test that takes it says `needs_native` too."""
    return str(request.param)
