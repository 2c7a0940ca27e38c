# SPDX-License-Identifier: Apache-2.0
"""What `serve.py` measured: which points there are, whether they may be believed, and their figures.

A point is one row (a way of serving) in one cell (clips, rate, load). A point that fails a check has no figures.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from bench.common import tables
from bench.serve.client import Sample

UNIT = 2
"""Frames of a temporal unit in the Qwen-VL families."""


@dataclass(frozen=True)
class Cell:
    """Clips, rate and load; all rows get the same.

    Attributes:
        frames: of each clip.
        rate: share of the video tokens to drop.
        concurrency: requests in flight.
        requests: requests in a repeat, each with a clip of its own.
        moving: share of the picture that moves in drawn clips; None is cuts of real clips.
    """

    frames: int = 32
    rate: float = 0.75
    concurrency: int = 1
    requests: int = 1
    moving: float | None = None

    @property
    def label(self) -> str:
        what = "real clips" if self.moving is None else f"{self.moving:.0%} moving"
        return f"{self.frames} frames, q={self.rate:g}, {self.concurrency} at a time, {what}"


@dataclass
class Repeat:
    """One turn of a row in a cell."""

    samples: list[Sample]
    wall_s: float
    planning_s: float | None = None
    """Mean time to plan one clip, by the server's own metric."""
    memory_mb: float | None = None


@dataclass
class Point:
    """One row in one cell. Times in seconds; a spread is the smallest and the largest of the repeats."""

    row: str
    cell: Cell
    sweeps: list[str] = field(default_factory=list)
    note: str = ""
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    samples: int = 0
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    ttft_spread_s: tuple[float, float] | None = None
    requests_per_s: float | None = None
    requests_per_s_spread: tuple[float, float] | None = None
    ttft_speedup: float | None = None
    ttft_speedup_spread: tuple[float, float] | None = None
    requests_speedup: float | None = None
    planning_ms: float | None = None
    memory_mb: float | None = None
    repeats: list[dict[str, Any]] = field(default_factory=list)


def units(frames: int) -> int:
    """Temporal units of a clip."""
    return math.ceil(frames / UNIT)


def kept_tokens(total: int, count: int, rate: float, stock: bool = False) -> int:
    """How many tokens of a clip stay, restated: at least one of `count` units; `rate` is a decimal.

    The default selection keeps, beside unit 0, at least half of the other units' share, so that a short clip is more
    than its first picture. `stock` is vLLM's option, which does not.
    """
    kept, unit = 1 - Fraction(str(rate)), total // count
    least = unit if stock else unit + math.ceil((total - unit) * kept / 2)
    return max(least, math.floor(total * kept))


def video_tokens(prompt: int, text: int, frames: int) -> int:
    """The clip's tokens in vanilla vLLM's prompt.

    Raises:
        ValueError: that is not the same number in every unit, so the text was counted wrong.
    """
    total = prompt - text
    if total <= 0 or total % units(frames):
        raise ValueError(f"{prompt} prompt tokens with {text} of text are no clip of {frames} frames")
    return total


def failure(cell: Cell, repeats: Sequence[Repeat], expected_prompt: int, output_tokens: int) -> str | None:
    """Why the figures of a row may not be believed, or None."""
    samples = [sample for repeat in repeats for sample in repeat.samples]
    if errors := [sample.error for sample in samples if sample.error]:
        return f"{len(errors)} of {len(samples)} requests failed, the first with: {errors[0]}"
    if wrong := {sample.prompt_tokens for sample in samples} - {expected_prompt}:
        return f"prompt of {sorted(wrong)} tokens, expected {expected_prompt}"
    if wrong := {sample.output_tokens for sample in samples} - {output_tokens}:
        return f"answers of {sorted(wrong)} tokens, expected {output_tokens}"
    # Batches of several requests form differently each time, and float sums with them: only one at a time is exact.
    answers = {tuple(sample.text for sample in repeat.samples) for repeat in repeats}
    if cell.concurrency == 1 and len(answers) > 1:
        return "the answers to the same requests differ between repeats"
    return None


def summarize(point: Point, repeats: Sequence[Repeat], vanilla: Sequence[Repeat]) -> None:
    """Fills in the figures. A speed-up is one of medians; its spread, of each repeat with vanilla beside it."""
    samples = [sample for repeat in repeats for sample in repeat.samples]
    point.samples = len(samples)
    point.prompt_tokens, point.output_tokens = samples[0].prompt_tokens, samples[0].output_tokens
    times = [sample.ttft_s for sample in samples]
    point.ttft_p50_s, point.ttft_p99_s = statistics.median(times), percentile(times, 0.99)
    point.ttft_spread_s = spread(_medians(repeats))
    rates = _rates(repeats)
    point.requests_per_s, point.requests_per_s_spread = statistics.median(rates), spread(rates)
    point.ttft_speedup = statistics.median(s.ttft_s for repeat in vanilla for s in repeat.samples) / point.ttft_p50_s
    point.ttft_speedup_spread = spread([a / b for a, b in zip(_medians(vanilla), _medians(repeats), strict=True)])
    point.requests_speedup = point.requests_per_s / statistics.median(_rates(vanilla))
    planning = [repeat.planning_s for repeat in repeats if repeat.planning_s is not None]
    point.planning_ms = statistics.median(planning) * 1e3 if planning else None
    memory = [repeat.memory_mb for repeat in repeats if repeat.memory_mb is not None]
    point.memory_mb = max(memory) if memory else None


def brief(point: Point) -> str:
    """One line for the terminal."""
    if point.error is not None:
        return f"{point.row:10} no figure: {point.error}"
    times = f"TTFT {point.ttft_p50_s:.2f} s ({point.ttft_speedup:.2f}x), {point.requests_per_s:.3f} requests/s"
    return f"{point.row:10} {times} ({point.requests_speedup:.2f}x), {point.prompt_tokens} prompt tokens"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed: no interpolation between few samples."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest."""
    return min(values), max(values)


def _medians(repeats: Sequence[Repeat]) -> list[float]:
    return [statistics.median(sample.ttft_s for sample in repeat.samples) for repeat in repeats]


def _rates(repeats: Sequence[Repeat]) -> list[float]:
    return [len(repeat.samples) / repeat.wall_s for repeat in repeats]


def table(points: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, from the points of a result file."""
    head = ["row", "prompt tokens", "TTFT p50 s", "spread", "p99 s", "speed-up", "requests/s", "speed-up", "peak MB"]
    lines = []
    for cell in dict.fromkeys(tuple(point["cell"].items()) for point in points):
        rows = [point for point in points if tuple(point["cell"].items()) == cell]
        samples = max(point["samples"] for point in rows)
        lines += [f"\n**{Cell(**dict(cell)).label}** ({samples} requests a row)\n"]
        lines += tables.markdown(head, [_cells(point) for point in rows], "lr")
    notes = dict.fromkeys(f"{point['row']}: {point['note']}" for point in points if point["note"])
    return "\n".join([*lines, *(f"\n{note}." for note in notes)]).strip()


def _cells(point: dict[str, Any]) -> list[str]:
    if point["error"]:
        return [point["row"], f"no figure: {point['error'][:160]}"]
    low, high = point["ttft_spread_s"]
    vanilla = point["row"] == "vanilla"
    return [
        point["row"], f"{point['prompt_tokens']}", f"{point['ttft_p50_s']:.2f}", f"{low:.2f}-{high:.2f}",
        f"{point['ttft_p99_s']:.2f}", "1" if vanilla else f"{point['ttft_speedup']:.2f}x",
        f"{point['requests_per_s']:.3f}", "1" if vanilla else f"{point['requests_speedup']:.2f}x",
        f"{point['memory_mb']:.0f}" if point["memory_mb"] else "",
    ]  # fmt: skip
