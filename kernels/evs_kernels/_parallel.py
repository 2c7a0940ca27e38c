# SPDX-License-Identifier: Apache-2.0
"""One thread pool for the numba kernels.

numba's own ``parallel=True`` is not used: its fallback threading layer aborts the process when two threads call
it at once, and servers call these kernels from thread pools. The kernels release the GIL, so plain threads do.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    # A forked child has the executor's object but none of its threads; work given to it would wait for ever.
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_cpus(), thread_name_prefix="evs_kernels")
        return _pool


def for_ranges(body: Callable[[int, int], None], start: int, stop: int, *, grain: int) -> None:
    """Runs ``body(lo, hi)`` over [start, stop) in equal parts, one per thread.

    Uses at most torch.get_num_threads() threads and no more than the CPUs this process may run on; the caller's
    thread takes a part itself. Parts must not call ``for_ranges``.

    Args:
        body: writes results of its own range only; releases the GIL.
        start: first item.
        stop: one past the last item.
        grain: smallest number of items worth a thread.
    """
    items = stop - start
    parts = max(1, min(torch.get_num_threads(), _cpus(), items // max(1, grain)))
    bounds = [start + items * i // parts for i in range(parts + 1)]
    jobs = [_executor().submit(body, lo, hi) for lo, hi in zip(bounds[1:-1], bounds[2:], strict=True)]
    try:
        body(bounds[0], bounds[1])
    finally:
        # Even after an error: the other parts still write into the caller's arrays.
        errors = [job.exception() for job in jobs]
    for error in errors:
        if error is not None:
            raise error
