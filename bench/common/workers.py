# SPDX-License-Identifier: Apache-2.0
"""Worker processes of benchmarks."""

import multiprocessing
import os
import threading


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
