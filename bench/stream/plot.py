# SPDX-License-Identifier: Apache-2.0
"""Draws a result file of `bench.stream` as SVG: TTFT and context over the stream. The same file gives the same bytes.

python -m bench.stream.plot bench/results/cpu/FILE.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

from bench.common.clips import FPS
from bench.serve.plot import SETTINGS

COLOURS = ("#999999", "#000000", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#E69F00")
MARKERS = "vo^Dsx+*"


def main() -> int:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a result file of bench.stream")
    parser.add_argument("--out", type=Path, help="folder; by default that of the file")
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    for frames in content["config"]["chunks"]:
        path = (args.out or args.file.parent) / f"{args.file.stem}-{frames}-frames.svg"
        draw(content, frames, path)
        print(path)
    return 0


def draw(content: dict[str, Any], frames: int, path: Path) -> None:
    """One figure for a length of chunks: a column for each scene, TTFT above, tokens of the prompt below."""
    scenes = content["config"]["scenes"]
    with plt.rc_context(SETTINGS | {"figure.figsize": (3.2 * len(scenes), 5.6)}):
        figure, axes = plt.subplots(2, len(scenes), squeeze=False, sharex=True, sharey="row")
        for column, scene in enumerate(scenes):
            shown = [p for p in content["results"] if (p["scene"], p["frames"]) == (scene, frames) and not p["error"]]
            for number, played in enumerate(shown):
                seconds = [(turn["number"] + 1) * frames / FPS for turn in played["turns"]]
                number %= len(COLOURS)
                style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 3, "lw": 1}
                for line, key in enumerate(("ttft_s", "prompt_tokens")):
                    values = [turn[key] for turn in played["turns"]]
                    axes[line][column].plot(seconds, values, label=played["row"], **style)
            axes[0][column].set_title(scene)
            axes[1][column].set_xlabel("seconds of the stream")
        axes[0][0].set_ylabel("TTFT of a turn, s")
        axes[1][0].set_ylabel("tokens of the prompt")
        for line in axes:
            line[0].set_ylim(bottom=0)
        axes[0][-1].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
