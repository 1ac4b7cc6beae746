"""The running step is there inside its context, and only there."""

from __future__ import annotations

import pytest

from omega_qvla.modules.step_context import Step, current_step, denoising_step


def test_steps_nest_and_end() -> None:
    assert current_step() is None
    with denoising_step(0, 4) as step:
        assert step == Step(0, 4) == current_step()
        with denoising_step(2, 3):
            assert current_step() == Step(2, 3)
        assert current_step() == Step(0, 4)
    assert current_step() is None


def test_an_error_ends_the_step_too() -> None:
    with pytest.raises(RuntimeError), denoising_step(1, 2):
        raise RuntimeError
    assert current_step() is None


@pytest.mark.parametrize("index, total", [(-1, 4), (4, 4), (0, 0)])
def test_impossible_steps_are_refused(index: int, total: int) -> None:
    with pytest.raises(ValueError, match="is not in"), denoising_step(index, total):
        pass
