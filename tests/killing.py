"""The command line in processes that can be killed, without the seconds that importing takes.

A server process imports everything once and forks for each command: what is killed is a
process of its own, with its own locks and open files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

_SERVER = """
import json, os, sys
import torch
torch.set_num_threads(1)
from omega_qvla.cli.main import main
import omega_qvla.cli.quantize, omega_qvla.cli.bundle, omega_qvla.quantize, omega_qvla.bundle
import omega_qvla.cli.checkpoints, omega_qvla.cli.sources, omega_qvla.config.presets
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(null, stream)
            os._exit(main(json.loads(line)))
        finally:
            os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """`run` starts one command at a time and may kill it."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._in, self._out = stdin, stdout

    def run(self, words: Sequence[object], kill_after: float | None = None) -> tuple[int, float]:
        """(exit code, -9 if it was killed; seconds)."""
        start = time.monotonic()
        self._in.write(json.dumps([str(word) for word in words]) + "\n")
        self._in.flush()
        pid = int(self._out.readline())
        process = os.pidfd_open(pid)  # the number itself could soon be somebody else's
        killer = threading.Timer(kill_after or 0.0, self._kill, [process])
        if kill_after is not None:
            killer.start()
        code = int(self._out.readline())
        if kill_after is not None:
            killer.cancel()
            killer.join()
        os.close(process)
        return code, time.monotonic() - start

    @staticmethod
    def _kill(process: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)


@contextmanager
def commands() -> Iterator[Commands]:
    """A server for the time of the body."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        yield Commands(server.stdin, server.stdout)
        server.stdin.close()
