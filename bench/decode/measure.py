# SPDX-License-Identifier: Apache-2.0
"""Times all ways to decode a file, in turns, and compares what they give. Runs in a process of its own."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.decode.ways import BASELINE, SAMPLINGS, WAYS, applies


def measure(path: Path, repeats: int) -> list[dict[str, Any]]:
    """All ways in turns, by sampling: seconds on the clock, of CPU time of all threads, and how far frames are apart.

    Args:
        path: The file.
        repeats: Timed runs of each, after one of the baseline.
    """
    data = path.read_bytes()
    cells = []
    for name, sampling in SAMPLINGS.items():
        ways = {way: load for way, load in WAYS.items() if applies(way, sampling)}
        cell: dict[str, Any] = {"sampling": name, "ways": {way: {"wall": [], "cpu": []} for way in ways}}
        reference, numbers = WAYS[BASELINE](data, sampling)
        cell["frames"] = len(reference)
        for number in range(repeats):
            for way, load in [*ways.items()]:
                found = cell["ways"][way]
                try:
                    wall, cpu = time.perf_counter(), time.process_time()
                    loaded = load(data, sampling)
                    found["cpu"].append(time.process_time() - cpu)
                    found["wall"].append(time.perf_counter() - wall)
                except Exception as error:  # a library that is not there must not hide the others
                    found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    del ways[way]
                    continue
                if number == 0:
                    found |= compared(loaded, reference, numbers)
                del loaded
        cells.append(cell)
    return cells


def compared(loaded: tuple[np.ndarray, list[int]], reference: np.ndarray, numbers: list[int]) -> dict[str, Any]:
    """How far frames are from those of the baseline: whether they have the same numbers, and grey levels if so."""
    frames, own = loaded
    if own != numbers:
        return {"same_numbers": False}
    most, total = 0, 0
    for left, right in zip(frames, reference, strict=True):
        apart = np.abs(left.astype(np.int16) - right)
        most, total = max(most, int(apart.max())), total + int(apart.sum())
    return {"same_numbers": True, "most_apart": most, "mean_apart": total / reference.size}
