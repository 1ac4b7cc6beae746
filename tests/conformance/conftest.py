"""Recorded cases of the original implementations, as parameters of the tests.

A test that takes `case` says which kind it compares: `pytestmark = pytest.mark.cases("pi05")`.
It then runs once for every case of that kind found in the directories given with `--cases`.
`case` has module scope, so a module-scoped fixture may build a model from it once.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .weights import make_weights

DEFAULT_CASES = Path(__file__).parents[1] / "data" / "conformance"
TOLERANCE = 2e-5

# What the JSON's `model` field starts with or contains -> the kind of case.
KINDS = {
    "openpi PI0Pytorch": "pi05",
    "FlowmatchingActionHead": "groot_head",
    "EagleBackbone": "eagle",
}


@dataclass(frozen=True)
class Case:
    """One recorded case: `name`.json and (except for prompts) `name`.safetensors."""

    name: str
    kind: str
    path: Path

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """The JSON: model, salt, config, weights, notes."""
        return json.loads(self.path.read_text())

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All `in.*` and `out.*` tensors."""
        return load_file(self.path.with_suffix(".safetensors"))

    def weights(self) -> dict[str, Tensor]:
        """The case's state dict, rebuilt and checked on every call (it may be gigabytes)."""
        return make_weights(self.meta)


def kind_of(meta: dict[str, Any]) -> str | None:
    """Which tests a JSON file is for; None if it is no case at all (the weight rule)."""
    model = str(meta.get("model", ""))
    for mark, kind in KINDS.items():
        if mark in model:
            return kind
    if model:
        raise pytest.UsageError(f"conformance case of an unknown model: {model!r}")
    runs = meta.get("cases")
    is_prompt = isinstance(runs, list) and all("ids_run_length" in run for run in runs)
    return "groot_prompt" if is_prompt else None


def find_cases(directories: tuple[Path, ...]) -> list[Case]:
    """All cases in `directories` (not below them).

    Raises:
        pytest.UsageError: a directory does not exist or holds no case, or a case's tensors
            are missing, so that a typing error cannot pass for success.
    """
    cases = []
    for directory in directories:
        found = []
        for path in sorted(directory.glob("*.json")):
            kind = kind_of(json.loads(path.read_text()))
            if kind is None:
                continue
            if kind != "groot_prompt" and not path.with_suffix(".safetensors").is_file():
                raise pytest.UsageError(f"{path.with_suffix('.safetensors')} is missing")
            found.append(Case(path.stem, kind, path))
        if not found:
            raise pytest.UsageError(f"--cases {directory}: no conformance cases there")
        cases += found
    return cases


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(kind): run once per recorded case of this kind")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("cases")
    if mark is None:
        raise pytest.UsageError(f"{metafunc.function.__name__} takes `case` without a cases mark")
    directories = metafunc.config.getoption("--cases") or [DEFAULT_CASES]
    cases = find_cases(tuple(Path(d) for d in directories))
    chosen = [case for case in cases if case.kind == mark.args[0]]
    metafunc.parametrize("case", chosen, ids=[case.name for case in chosen], scope="module")


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Fail unless shapes agree and no element is further than `tolerance` away."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max().item()
        assert torch.isfinite(actual).all(), f"{what}: not finite"
        assert error <= tolerance, f"{what}: off by {error:.2e}, tolerance {tolerance:.0e}"
