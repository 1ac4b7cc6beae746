"""Several inferences that go through the network together, stage by stage.

Each runs in a thread of its own, and waits wherever a stage begins; only one ever runs. So
the code of the policies is what inference runs, unchanged, and between two stages nothing of
an inference is alive but what the stages to come need of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from torch import nn

Mark = Callable[[str], None]
#: An inference: calls `mark(name)` where it may be made to wait.
Body = Callable[[Mark], None]


class _Abandoned(BaseException):
    """Ends an inference that nobody waits for any more; nothing in it may catch this."""


class _Runner:
    """One inference in its thread, which runs only inside `advance`."""

    def __init__(self, body: Body) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self.at: str | None = ""  # the mark where it waits; None: it has ended
        context = copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, body), daemon=True)
        self._thread.start()

    def _run(self, body: Body) -> None:
        try:
            self._wait()
            body(self.mark)
        except _Abandoned:
            pass
        except BaseException as error:  # handed to whoever calls `advance`
            self._error = error
        finally:
            self.at = None
            self._stopped.release()

    def _wait(self) -> None:
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def mark(self, name: str) -> None:
        """Wait here. Called by the inference."""
        self.at = name
        self._stopped.release()
        self._wait()

    def advance(self) -> None:
        """Run to the next mark or the end. Raises what the inference raises."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Unwind the thread, wherever it waits."""
        if self.at is not None:
            self._abandoned = True
            self._go.release()
        self._thread.join()


class Lockstep:
    """Inferences that `advance` together; made by `lockstep`."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        self._runners = [_Runner(body) for body in bodies]
        self._running: _Runner | None = None

    def arrive(self, name: str) -> None:
        """The inference that runs has come to `name`, and waits."""
        assert self._running is not None  # hooks are called by an inference
        self._running.mark(name)

    def advance(self, index: int, until: str | None) -> None:
        """Run inference number `index` until it comes to `until`, or ends."""
        runner = self._running = self._runners[index]
        while runner.at is not None:
            runner.advance()
            if runner.at == until:
                return

    def close(self) -> None:
        for runner in self._runners:
            runner.close()


@contextmanager
def lockstep(module: nn.Module, bodies: Sequence[Body], entries: Sequence[str]) -> Iterator[Any]:
    """`bodies`, ready to advance; each waits where a module called in `entries` is entered.

    Names in `entries` that are no modules are marks that the bodies set themselves.
    """
    together = Lockstep(bodies)
    modules = dict(module.named_modules())

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: together.arrive(name)

    handles = [
        modules[name].register_forward_pre_hook(hook(name)) for name in entries if name in modules
    ]
    try:
        yield together
    finally:
        together.close()
        for handle in handles:
            handle.remove()
