# SPDX-License-Identifier: Apache-2.0
"""What the front end is of the time to first token on a GPU that was not there: a model, not a measurement.

It puts the measured gain of the front end (``python -m bench.frontend``) beside an estimate of a GPU's times, which was
made from machine code, from counts of operations and from reading vLLM's and our code: an H100, Qwen2.5-VL-7B, 32
frames of 512x512. Example: ``python -m bench.frontend.estimate bench/results/frontend/frontend.json``
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import tables
from bench.common.harness import RESULTS

MEASURED_LIKE = "32 frames of 1280x720"
"""The measured clip whose gain is taken over: as many frames."""

PROCESSOR = ("hf", "cells", "describe", "choose", "rows")
"""The measured stages that stand for what stock vLLM has Hugging Face's processor do."""

DECODE = (60.0, 120.0)
"""Milliseconds on a CPU. An estimate; EVS does not shorten it."""
STOCK_PROCESSOR = 150.0
"""Milliseconds of vLLM's hash and Hugging Face's processor, of such a clip: measured on one CPU, no result file."""
PLANNING_0_1_0 = 5.0
"""Milliseconds that version 0.1.0 added to that. An estimate."""
TOWER = {"vanilla": 85.0, "0.1.0": 31.0}
"""Milliseconds on an H100. An estimate from machine code: 27.3 and 9.5 TFLOP."""
TOWER_COMPUTES = {"0.1.0": 34.0, "now": 39.0}
"""Percent of all tokens that the tower computes at rate 0.75. Measured on real clips."""
PREFILL = {"vanilla": 150.0, "0.75": 40.0}
"""Milliseconds on an H100. An estimate from counts of operations."""


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one request, by what happens one after the other."""

    name: str
    processor: float
    tower: float
    prefill: float

    def total(self, decode: float) -> float:
        return decode + self.processor + self.tower + self.prefill

    def share(self, decode: float) -> float:
        """What processor and planning are of the time to first token."""
        return self.processor / self.total(decode)


def estimates(gain: float) -> tuple[Estimate, Estimate, Estimate]:
    """Vanilla vLLM, version 0.1.0 and now, at rate 0.75.

    Args:
        gain: How many times faster processor and planning were measured to be than the stock processor.
    """
    tower = TOWER["0.1.0"] * TOWER_COMPUTES["now"] / TOWER_COMPUTES["0.1.0"]
    return (
        Estimate("vanilla", STOCK_PROCESSOR, TOWER["vanilla"], PREFILL["vanilla"]),
        Estimate("rate 0.75, 0.1.0", STOCK_PROCESSOR + PLANNING_0_1_0, TOWER["0.1.0"], PREFILL["0.75"]),
        Estimate("rate 0.75, now", STOCK_PROCESSOR / gain, tower, PREFILL["0.75"]),
    )


def gain_of(content: dict[str, Any], row: str = "0.75") -> float:
    """How many times faster processor and planning are than the stock processor, in a result file of the front end."""
    (cell,) = (cell for cell in content["cells"] if cell["clip"] == MEASURED_LIKE)
    stock, own = (
        sum(statistics.median(cpu for _, cpu in cell["samples"][name][stage]) for stage in PROCESSOR)
        for name in ("stock", row)
    )
    return stock / own


def report(content: dict[str, Any]) -> str:
    """Markdown."""
    gain = gain_of(content)
    columns = estimates(gain)
    vanilla = columns[0]

    def spread(value: Any) -> str:
        low, high = (value(decode) for decode in DECODE)
        return f"{low:.0f} to {high:.0f}"

    def percent(value: Any) -> str:
        high, low = (100 * value(decode) for decode in DECODE)
        return f"{low:.0f} to {high:.0f} %"

    body = [
        ["decode the video (CPU)", *(spread(lambda decode: decode) for _ in columns)],
        ["processor and planning (CPU, one thread)", *(f"{column.processor:.0f}" for column in columns)],
        ["vision tower", *(f"{column.tower:.0f}" for column in columns)],
        ["language prefill", *(f"{column.prefill:.0f}" for column in columns)],
        ["all, to the first token", *(spread(column.total) for column in columns)],
        ["processor and planning, of all", *(percent(column.share) for column in columns)],
    ]
    faster = ["faster than vanilla", "1.0x"]
    for column in columns[1:]:
        low, high = sorted(vanilla.total(decode) / column.total(decode) for decode in DECODE)
        faster.append(f"{low:.1f}x to {high:.1f}x")
    lines = [
        f"A model: nothing was run on an H100, its times are estimated. Measured is the {gain:.1f}x of the processor.",
        "",
        *tables.markdown(["milliseconds, estimated", *(column.name for column in columns)], [*body, faster], "lr"),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS / "frontend" / "frontend.json")
    print(report(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
