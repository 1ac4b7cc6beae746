"""Work in parallel processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from omega_qvla.errors import OmegaError

#: spawn: a forked child would inherit torch's threads and a simulator's GL context.
CONTEXT = multiprocessing.get_context("spawn")


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that forgets what it has not begun when the block raises.

    Raises:
        OmegaError: a process was killed.
    """
    pool = ProcessPoolExecutor(max(1, workers), mp_context=CONTEXT)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OmegaError(
            "a process died: most likely the machine ran out of memory; try --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
