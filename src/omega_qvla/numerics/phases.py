"""Where the time of a build goes: named phases, measured by whoever wants to know.

Code that belongs to a phase says so with `phase(name)`; it costs nothing unless somebody
further up the call has opened `Stopwatch.running()`. The stopwatch travels by context, as the
denoising step does, so concurrent builds do not see each other's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Spent:
    """Seconds in a phase: by the clock, and of processors (all threads of the process)."""

    wall: float = 0.0
    cpu: float = 0.0


@dataclass
class Stopwatch:
    """Time by phase. A phase inside another one is taken out of the outer one's time."""

    phases: dict[str, Spent] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def running(self, name: str = "other") -> Iterator[None]:
        """Measure the body; what belongs to no phase in it counts as `name`."""
        token = _CURRENT.set(self)
        try:
            with self.measure(name):
                yield
        finally:
            _CURRENT.reset(token)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the body as phase `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self) -> None:
        """Give the time since the last change to the phase that was running."""
        now = (time.perf_counter(), time.process_time())
        if self._open:
            spent = self.phases.setdefault(self._open[-1], Spent())
            spent.wall += now[0] - self._since[0]
            spent.cpu += now[1] - self._since[1]
        self._since = now


_CURRENT: ContextVar[Stopwatch | None] = ContextVar("omega_qvla_stopwatch", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Declare that the body belongs to the phase `name` of a build."""
    watch = _CURRENT.get()
    if watch is None:
        yield
        return
    with watch.measure(name):
        yield
