"""Keeping what a running robot saw and did, to calibrate on and to measure drift on later.

What comes out is a folder of recorded episodes as `calibration.sources.RecordedFolder` reads it
(`--observations DIR` of `calibrate`, `quantize` and `compare`). Inference never waits for it and
never fails because of it: what cannot be kept is counted, and said in the report.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from omega_qvla.errors import ConfigError, RecordingError
from omega_qvla.pack.files import why_not_written
from omega_qvla.pack.lock import output_lock
from omega_qvla.policies.observation import Observation
from omega_qvla.runtime.recording import NAME, Step, Steps, episode_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecorderOptions:
    """How much is kept.

    every: one of so many inferences is recorded.
    steps_per_file: a file is written when it has so many steps, and at the end of an episode;
        a crash loses what was not written yet.
    max_bytes: of the folder's recordings; the oldest files make room for new ones.
    pending_bytes: of observations that wait in memory for a slow disk; beyond, they are dropped.
    """

    every: int = 1
    steps_per_file: int = 64
    max_bytes: int = 4 << 30
    pending_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"recorder: {name} must be a positive integer, not {value!r}")


@dataclass(frozen=True)
class RecorderReport:
    """What became of the observations.

    written: are in files (some of which may have been removed again: removed_files).
    pending: wait for their file. dropped: came while too many waited. rejected: no valid
    observation or no valid actions. failed: their file could not be written.
    last_error: why the last one was rejected or failed.
    """

    written: int = 0
    pending: int = 0
    dropped: int = 0
    rejected: int = 0
    failed: int = 0
    files: int = 0
    removed_files: int = 0
    last_error: str | None = None

    @property
    def lost(self) -> int:
        """Observations that were to be recorded and are not."""
        return self.dropped + self.rejected + self.failed


@dataclass(eq=False)
class RecordedEpisode:
    """What steps belong to, see `Recorder.begin`. number: None until the first one comes."""

    number: int | None = None
    task: str | None = None
    seen: int = 0


class Recorder:
    """Records observations and actions in a thread of its own.

    One recorder per folder, of any number of inferences one after another (or side by side).
    Use it as a context manager, or call `close`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], options: RecorderOptions | None = None
    ) -> None:
        """Make the folder, or go on with it: episodes are numbered on from those it has.

        Raises:
            RecordingError: it cannot be written, or another recorder is writing there.
        """
        self.folder = Path(folder)
        self.options = options or RecorderOptions()
        self._report, self._pending_bytes = RecorderReport(), 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Step | threading.Event | None] = queue.SimpleQueue()
        self._stack = ExitStack()
        self._closed = False
        try:
            self._stack.enter_context(output_lock(self.folder, RecordingError))
            self._files = self._open()
        except BaseException:
            self._stack.close()
            raise
        numbers = [episode_of(path) for path, _ in self._files]
        self._next = max(numbers, default=-1) + 1
        self._episode = RecordedEpisode()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def _open(self) -> deque[tuple[Path, int]]:
        """The recordings that are there already, oldest first."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".episode-*.tmp"):
                leftover.unlink()
            found = [f for f in self.folder.iterdir() if re.fullmatch(NAME, f.name)]
            stats = sorted((f.stat().st_mtime_ns, f.name, f.stat().st_size) for f in found)
        except OSError as error:
            raise RecordingError(
                f"{self.folder}: cannot be recorded to: {why_not_written(error)}"
            ) from error
        return deque((self.folder / name, size) for _, name, size in stats)

    def begin(self, episode: int | None = None, task: str | None = None) -> RecordedEpisode:
        """A new episode begins: another task, another try, another client.

        `record` adds to it, unless told another one: who serves several robots side by side
        keeps what this returns, so that their steps are not mixed.

        Args:
            episode: its number; by default, the next one. A number that comes twice is refused
                when the folder is read.
            task: its name; by default, the instruction.
        """
        begun = RecordedEpisode(episode, task)
        with self._lock:
            self._episode = begun
        return begun

    def record(
        self,
        observation: Observation,
        actions: np.ndarray,
        episode: RecordedEpisode | None = None,
    ) -> bool:
        """Keep an observation and the chunk that the policy answered; whether it will be.

        Nothing is raised, and nothing is waited for: arrays are copied, the rest happens later.

        Args:
            episode: what `begin` returned; by default, of its last call.
        """
        try:
            with self._lock:
                episode = episode or self._episode
                number = episode.number = self._next if episode.number is None else episode.number
                if not episode.seen:
                    self._next = number + 1
                index, episode.seen = episode.seen, episode.seen + 1
                if self._closed or index % self.options.every:
                    return False
            step = Step.copy(observation, actions, number, index, episode.task)
        except Exception as error:  # whatever it is, the robot goes on
            self._count(rejected=1, last_error=f"{type(error).__name__}: {error}")
            return False
        return self._hand_over(step)

    def report(self) -> RecorderReport:
        """What became of the observations so far."""
        with self._lock:
            return self._report

    def flush(self, timeout: float | None = None) -> bool:
        """Have everything written that was recorded so far; whether it was within `timeout` s."""
        done = threading.Event()
        with self._lock:  # behind the end that `close` puts, nobody would ever set it
            closed = self._closed
            if not closed:
                self._queue.put(done)
        if not closed:
            return done.wait(timeout)
        self._thread.join(timeout)
        return self.report().pending == 0

    def close(self, timeout: float = 30.0) -> RecorderReport:
        """Write what waits, within `timeout` seconds, and end. Calling it again does nothing."""
        with self._lock:
            closing, self._closed = not self._closed, True
            if closing:
                self._queue.put(None)
        if closing:
            self._thread.join(timeout)
            if not self._thread.is_alive():  # otherwise it may still write: the folder is taken
                self._stack.close()
        return self.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hand_over(self, step: Step) -> bool:
        """Give a step to the thread, unless too much waits for it already."""
        with self._lock:  # the queue as well: nothing may come behind the end that `close` puts
            if self._closed:
                return False
            if self._pending_bytes + step.nbytes > self.options.pending_bytes:
                self._report = replace(self._report, dropped=self._report.dropped + 1)
                return False
            self._pending_bytes += step.nbytes
            self._report = replace(self._report, pending=self._report.pending + 1)
            self._queue.put(step)
        return True

    def _count(self, last_error: str | None = None, **more: int) -> None:
        with self._lock:
            changes = {name: getattr(self._report, name) + n for name, n in more.items()}
            error = self._report.last_error if last_error is None else last_error
            self._report = replace(self._report, last_error=error, **changes)

    def _run(self) -> None:
        steps: Steps | None = None
        while True:
            item = self._queue.get()
            if isinstance(item, Step):
                steps = self._keep(steps, item)
                continue
            self._write(steps)
            steps = None
            if item is None:
                return
            item.set()

    def _keep(self, steps: Steps | None, step: Step) -> Steps | None:
        """Add a step to those that will be one file; write them where the next begins."""
        if steps is not None and not steps.takes(step):
            self._write(steps)
            steps = None
        try:
            steps = steps or Steps(step, self.options.steps_per_file)
            steps.add(step)
        except Exception as error:  # no memory for a file's steps
            self._count(pending=-1, failed=1, last_error=f"{type(error).__name__}: {error}")
        self._forget(step)
        if steps is None or not steps.full:
            return steps
        self._write(steps)
        return None

    def _forget(self, step: Step) -> None:
        with self._lock:
            self._pending_bytes -= step.nbytes

    def _write(self, steps: Steps | None) -> None:
        """Write a file, making room for it first. Failures are counted, and logged if new."""
        if not steps:
            return
        count, before = len(steps), self._report.last_error
        try:
            removed = self._make_room(steps.nbytes)
            path = steps.write(self.folder)
            self._files.append((path, path.stat().st_size))
            self._count(written=count, pending=-count, files=1, removed_files=removed)
            return
        except OSError as failure:
            reason = f"{self.folder}: {why_not_written(failure)}"
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
        self._count(pending=-count, failed=count, last_error=reason)
        if reason != before:
            _log.warning("%d observations are not recorded: %s", count, reason)

    def _make_room(self, size: int) -> int:
        """Remove the oldest files until `size` more bytes are allowed; how many."""
        if size > self.options.max_bytes:
            raise RecordingError(
                f"a file of {size} bytes is more than max_bytes, {self.options.max_bytes}"
            )
        removed = 0
        while self._files and size + sum(n for _, n in self._files) > self.options.max_bytes:
            path, _ = self._files.popleft()
            path.unlink(missing_ok=True)
            removed += 1
        return removed
