# SPDX-License-Identifier: Apache-2.0
"""How long video files take to decode: vLLM's loaders, and decoding only what sampled frames need, in turns.

No engine is started. Files are made on first use, which takes minutes. Every row's frames are compared with those of
vLLM's ``opencv``. Example: ``python -m bench.decode --out bench/results/decode/decode.json``
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from bench.common import harness, tables
from bench.common.workers import on_cpus
from bench.decode.clips import FPS, FileSpec, video_file
from bench.decode.measure import measure
from bench.decode.ways import BASELINE, WAYS

SIZES = ((720, 1280), (1080, 1920))
SECONDS = (10, 60)
KEY_DISTANCES = (60, 250)
FILES = (
    *(FileSpec(seconds * FPS, *size, keys) for seconds in SECONDS for size in SIZES for keys in KEY_DISTANCES),
    FileSpec(60 * FPS, 720, 1280, 60, b_frames=0),
)
SMOKE = (FileSpec(40, 96, 160, 12),)
CPUS = (1, 2)
"""Processes are pinned to so many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small file, two repeats: seconds; says nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpus", type=int, nargs="+", default=CPUS, help="pinned to so many; each is a run of its own")
    parser.add_argument("--out", type=Path, help="default: bench/results/decode/<date>-<commit>-decode.json")
    args = parser.parse_args()
    environment = harness.environment()
    repeats = 2 if args.smoke else args.repeats
    files = SMOKE if args.smoke else FILES
    paths = {}
    for spec in files:
        print(f"file: {spec.name}", flush=True)
        paths[spec] = video_file(spec)
    content: dict[str, Any] = {
        "schema": harness.SCHEMA_VERSION,
        "bench": "decode",
        "config": {"repeats": repeats, "smoke": args.smoke},
        "environment": environment,
        "warnings": harness.warnings(environment),
        "cells": [],
    }
    out = args.out or harness.default_path(harness.RESULTS, "decode", "decode")
    for cpus in [number for number in args.cpus if number <= len(os.sched_getaffinity(0))]:
        for spec, path in paths.items():
            measured = on_cpus(cpus, measure, path, repeats)
            megabits = path.stat().st_size * 8 / 1e6 / (spec.frames / FPS)
            content["cells"] += [{"file": spec.name, "megabits": megabits, "cpus": cpus, **cell} for cell in measured]
            harness.write(content, out)  # a run takes long: what is there is kept
            out.with_suffix(".md").write_text(report(content))
            print(f"{cpus} CPUs: {spec.name}", flush=True)
    print(report(content))
    print(f"written to {out}")


def report(content: dict[str, Any]) -> str:
    """Markdown: a table for each number of CPUs, wall and CPU time, and what the frames are."""
    lines = list(content["warnings"])
    for cpus in dict.fromkeys(cell["cpus"] for cell in content["cells"]):
        cells = [cell for cell in content["cells"] if cell["cpus"] == cpus]
        ours = next(way for way in WAYS if way.startswith("only"))
        body = []
        factors = []
        for cell in cells:
            row = [f"{cell['file']}, {cell['megabits']:.1f} Mbit/s", f"{cell['sampling']} ({cell['frames']})"]
            row += [_times(cell["ways"].get(way)) for way in WAYS]
            factor = _factor(cell["ways"], ours)
            factors.append(factor)
            body.append([*row, f"{factor:.2f}x" if factor else "-"])
        lines += ["", f"**{cpus} CPU{'s' if cpus > 1 else ''}**, seconds on the clock (of CPU time), medians", ""]
        lines += tables.markdown(
            ["file", "sampled (frames)", *WAYS, f"{ours}: CPU time, against {BASELINE}"], body, "llr"
        )
        if known := sorted(factor for factor in factors if factor):
            middle, twice = statistics.median(known), sum(factor >= 2 for factor in known)
            lines += ["", f"{ours}: {known[0]:.2f}x to {known[-1]:.2f}x, median {middle:.2f}x; "]
            lines[-1] += f"at least 2x in {twice} of {len(known)} rows."
    lines += ["", "(*) Other frames: the key frame before each. The rest, compared with the baseline's:", ""]
    return "\n".join([*lines, *(f"- {way}: {_apart(content['cells'], way)}" for way in WAYS), ""])


def _times(way: dict[str, Any] | None) -> str:
    if not way or not way["wall"]:
        return "-"
    return f"{statistics.median(way['wall']):.2f} ({statistics.median(way['cpu']):.2f})"


def _factor(ways: dict[str, Any], way: str) -> float:
    own, base = (ways[name]["cpu"] for name in (way, BASELINE))
    return statistics.median(base) / statistics.median(own) if own else 0.0


def _apart(cells: Sequence[dict[str, Any]], way: str) -> str:
    found = [cell["ways"][way] for cell in cells if way in cell["ways"]]
    if errors := sorted({one["error"] for one in found if "error" in one}):
        return f"no figure: {'; '.join(errors)}"
    same = [one for one in found if one["same_numbers"]]
    text = f"the same frame numbers in {len(same)} of {len(found)} rows"
    if same:
        most, mean = (max(one[key] for one in same) for key in ("most_apart", "mean_apart"))
        text += f", pixels at most {most} grey levels apart, {mean:.3f} in the mean of the worst row"
    return text


if __name__ == "__main__":
    main()
