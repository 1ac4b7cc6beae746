"""Training scripts are plain modules beside each other, as `python training/train.py` has them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "training"))
    for name in ("card", "collect_libero", "configs", "data", "export", "families", "train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
