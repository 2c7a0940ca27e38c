# SPDX-License-Identifier: Apache-2.0
"""Worker processes of benchmarks."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def on_cpus(cpus: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function in a new process that is pinned to so many CPUs, the last ones that this process may use.

    Libraries count CPUs once, and threads keep what they were started with, so each number takes a process of its own.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-cpus:])
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args, **kwargs).result()
    finally:
        os.sched_setaffinity(0, allowed)


def start_worker(threads: int) -> None:
    """To be called first in a worker: sets torch's threads, and ends the worker when the main process is gone."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """However the main process ended: a worker would go on for minutes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
