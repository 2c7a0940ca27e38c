# SPDX-License-Identifier: Apache-2.0
"""The project's bars, read off a result file: what was asked for and what was measured. Nothing is measured here."""

import math
from functools import partial
from typing import Any

from bench.common.targets import add_bar

REUSE, FULL = "evs-reuse", "evs-full"
PAPER_RATIO = 0.125 / 0.189
"""Vision tower over language prefill of Qwen2.5-VL-7B, from the paper's split of its time."""


def bars(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar that the file has figures for: `what`, `asked`, `measured`, `met` (None is for information only)."""
    found: list[dict[str, Any]] = []
    add = partial(add_bar, found)
    for rate, asked in ((0.75, 3.5), (0.9, 6.0)):
        here = {"frames": 32, "concurrency": 1, "moving": None, "rate": rate}
        add(f"TTFT against vanilla, q={rate:g}, 32 frames", _figure(content, REUSE, "ttft_speedup", **here), asked)
        if rate == 0.75:
            full, reuse = (_figure(content, row, "ttft_p50_s", **here) for row in (FULL, REUSE))
            add("TTFT against pruning after the tower, same", full / reuse if full and reuse else None, 2.0)
    for concurrency in (8, 32):
        speedup = _figure(content, REUSE, "requests_speedup", concurrency=concurrency, moving=None, rate=0.75)
        add(f"requests/s against vanilla, {concurrency} at a time, q=0.75", speedup, 3.0)
    both = [p for p in content["results"] if p["row"] in (REUSE, FULL) and not p["error"]]
    add("smallest requests/s against vanilla of any cell", _least(both, "requests_speedup"), 1.0)
    moving = [p for p in both if p["cell"]["moving"] == 1.0 and p["row"] == REUSE]
    add("TTFT against vanilla where everything moves", _least(moving, "ttft_speedup"), 1.0)

    seconds = {(entry["row"], entry["frames"]): entry["seconds"] for entry in content["stages"]}
    if (REUSE, 64) in seconds and ("vanilla", 64) in seconds:
        own, vanilla = seconds[REUSE, 64], seconds["vanilla", 64]
        share = (own["planning"] + own["positions"]) / vanilla["ttft"]
        add("planning and positions, of vanilla TTFT, 64 frames", share * 100, 2.0, at_most=True, unit="%")
    frames = sorted(count for row, count in seconds if row == REUSE)
    if len(frames) > 1 and frames[0] * 2 <= frames[-1]:
        for stage in ("decode", "hf", "planning", "positions", "transport", "tower"):
            first, last = (seconds[REUSE, count][stage] for count in (frames[0], frames[-1]))
            if first > 0 and last > 0:
                growth = math.log(last / first) / math.log(frames[-1] / frames[0])
                # 1 is linear. Some room for caches that large clips fall out of.
                words = f"growth of {stage!r}, {frames[0]} to {frames[-1]} frames"
                add(words, growth, 1.15, at_most=True, unit="power")
    for count in sorted(count for row, count in seconds if row == "vanilla"):
        times = seconds["vanilla", count]
        words = f"tower : prefill of vanilla, {count} frames (paper's 7B: {PAPER_RATIO:.2f})"
        add(words, times["tower"] / times["prefill"], None, unit="")
    return found


def _figure(content: dict[str, Any], row: str, figure: str, **cell: Any) -> float | None:
    for point in content["results"]:
        if point["row"] == row and all(point["cell"][key] == value for key, value in cell.items()):
            value: float | None = point[figure]
            return value
    return None


def _least(found: list[dict[str, Any]], figure: str) -> float | None:
    return min((point[figure] for point in found), default=None)
