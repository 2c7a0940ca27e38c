# SPDX-License-Identifier: Apache-2.0
"""Draws a result file of `serve.py` as SVG. Measures nothing, and the same file gives the same bytes.

    python -m bench.serve.plot bench/results/cpu/FILE.json

writes ``FILE-ttft-rate.svg``, ``-ttft-frames``, ``-ttft-concurrency``, ``-throughput-concurrency``, ``-ttft-moving``
and ``-stages`` beside it, those that the file has figures for.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.serve.stages import STAGES

# Okabe-Ito: told apart without colour vision; the marker says it once more.
STYLES = {
    "vanilla": ("vanilla vLLM", "#000000", "o"),
    "stock": ("vLLM --video-pruning-rate", "#D55E00", "s"),
    "evs-full": ("evs-vllm, full tower", "#56B4E9", "^"),
    "evs-reuse": ("evs-vllm, reuse", "#009E73", "D"),
    "evs-off": ("evs-vllm, nothing dropped", "#999999", "v"),
}
STAGE_COLOURS = (
    "#999999", "#E69F00", "#000000", "#F0E442", "#CC79A7", "#D55E00", "#56B4E9", "#0072B2", "#DDDDDD",
)  # fmt: skip
SETTINGS = {
    "svg.hashsalt": "evs-vllm",  # the same identifiers in every run
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.figsize": (6.4, 4.0),
    "savefig.bbox": "tight",
}


def main() -> int:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a result file of bench/serve")
    parser.add_argument("--out", type=Path, help="folder; by default that of the file")
    args = parser.parse_args()
    for path in draw(json.loads(args.file.read_text()), args.out or args.file.parent, args.file.stem):
        print(path)
    return 0


def draw(content: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """All figures of a result file; those it has no data for are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def figure(name: str, fill: Callable[[Axes], bool]) -> None:
        with plt.rc_context(SETTINGS):
            canvas, axes = plt.subplots()
            if fill(axes):
                path = folder / f"{stem}-{name}.svg"
                canvas.savefig(path, metadata={"Date": None})
                written.append(path)
            plt.close(canvas)

    points = [point for point in content["results"] if not point["error"]]
    load = "requests at a time"
    ttft, rate = ("ttft_p50_s", "ttft_spread_s"), ("requests_per_s", "requests_per_s_spread")
    figure("ttft-rate", lambda axes: sweep(axes, points, "rate", ttft, "share of video tokens dropped"))
    figure("ttft-frames", lambda axes: sweep(axes, points, "frames", ttft, "frames", log=True))
    figure("ttft-concurrency", lambda axes: sweep(axes, points, "concurrency", ttft, load, log=True))
    figure("throughput-concurrency", lambda axes: sweep(axes, points, "concurrency", rate, load, log=True))
    figure("ttft-moving", lambda axes: sweep(axes, points, "moving", ttft, "share of the picture that moves"))
    figure("stages", lambda axes: stage_bars(axes, content["stages"]))
    return written


def sweep(
    axes: Axes,
    points: Sequence[dict[str, Any]],
    axis: str,
    names: tuple[str, str],
    label: str,
    log: bool = False,
) -> bool:
    """One line a row: a figure against an axis of the cells of the sweep that is named like the axis."""
    members = [point for point in points if axis in point["sweeps"]]
    if len({point["cell"][axis] for point in members}) < 2:
        return False
    figure, spread = names
    ticks = sorted({point["cell"][axis] for point in members})
    for row, (name, colour, marker) in STYLES.items():
        mine = sorted((point["cell"][axis], point[figure], *point[spread]) for point in members if point["row"] == row)
        if mine:
            x, y, low, high = zip(*mine, strict=True)
            # A median of all requests may lie outside the medians of the repeats by a hair.
            errors = [[max(0, b - a) for a, b in zip(low, y)], [max(0, b - a) for a, b in zip(y, high)]]
            axes.errorbar(x, y, errors, label=name, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.5)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)
    axes.set_ylabel("time to first token, s (median)" if figure == "ttft_p50_s" else "requests per second")
    axes.set_title(_fixed(members, axis), fontsize=9, loc="left")
    # Below the axes, where no line can run through it.
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return True


def stage_bars(axes: Axes, entries: Sequence[dict[str, Any]]) -> bool:
    """Where the time to the first token goes: one bar for each row and number of frames, as a share of vanilla's."""
    if not entries:
        return False
    base = {entry["frames"]: entry["seconds"]["ttft"] for entry in entries if entry["row"] == "vanilla"}
    entries = sorted((e for e in entries if e["frames"] in base), key=lambda e: -e["frames"])
    names = [f"{STYLES[entry['row']][0]}, {entry['frames']} frames" for entry in entries]
    left = [0.0] * len(entries)
    for (stage, words), colour in zip(STAGES.items(), STAGE_COLOURS, strict=True):
        widths = [max(0.0, entry["seconds"][stage] / base[entry["frames"]]) * 100 for entry in entries]
        axes.barh(names, widths, left=left, color=colour, label=words, edgecolor="white", linewidth=0.3)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.figure.set_size_inches(7.5, 1.6 + 0.35 * len(entries))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of vanilla vLLM's time to first token, %")
    axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.02, 0.88))
    return True


def _fixed(members: Sequence[dict[str, Any]], axis: str) -> str:
    """What all members of a sweep have in common, for the title."""
    cell = members[0]["cell"]
    words = {
        "frames": f"{cell['frames']} frames",
        "rate": f"rate {cell['rate']:g}",
        "concurrency": "one request at a time" if cell["concurrency"] == 1 else f"{cell['concurrency']} at a time",
        "moving": "cuts of real clips" if cell["moving"] is None else f"{cell['moving']:.0%} of the picture moves",
    }
    return ", ".join(text for name, text in words.items() if name != axis)


if __name__ == "__main__":
    sys.exit(main())
