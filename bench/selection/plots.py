# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result of `bench.selection`."""

from pathlib import Path
from typing import Any

from bench.selection.measures import MEASURES
from bench.selection.report import PAPER, PLAIN, distinct, mean_of, ratio


def plot(result: dict[str, Any], folder: Path) -> None:
    """Draws ``rates.png``: both measures against the rate, and ``conditions.png``: losses over the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    _rates(result, folder / "rates.png")
    if PAPER in result["settings"]["selections"]:
        _conditions(result, folder / "conditions.png")


def _rates(result: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    rows, settings = result["rows"], result["settings"]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), sharex=True)
    for line, (where, some) in zip(axes, ((PLAIN, {"condition": PLAIN}), ("all conditions", {})), strict=True):
        for plot, measure in zip(line, MEASURES, strict=True):
            for way in distinct(rows, "selection"):
                losses = [mean_of(rows, measure, selection=way, rate=rate, **some) for rate in settings["rates"]]
                own = way in settings["selections"]
                plot.plot(settings["rates"], losses, "o-" if own else "s--", linewidth=2 if own else 1, label=way)
            plot.set(title=f"{measure}, {where}", ylim=(0, None), xlabel="share of video tokens dropped")
            plot.set_ylabel("1 - cosine, lower is better")
            plot.grid(color="#DDDDDD")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _conditions(result: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    rows, settings = result["rows"], result["settings"]
    rate = 0.75 if 0.75 in settings["rates"] else settings["rates"][0]
    ways = [way for way in distinct(rows, "selection") if way != PAPER]
    conditions = settings["conditions"]
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 1.5 + 0.45 * len(ways)), sharey=True)
    for plot, measure in zip(axes, MEASURES, strict=True):
        values = [[ratio(rows, measure, way, rate=rate, condition=each) for each in conditions] for way in ways]
        plot.imshow(values, cmap="RdYlGn_r", vmin=0, vmax=2, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                plot.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
        plot.set_xticks(range(len(conditions)), conditions, rotation=35, ha="right")
        plot.set_yticks(range(len(ways)), ways)
        plot.set_title(f"{measure} at q={rate:g}, over that of the paper's RGB")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
