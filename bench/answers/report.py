# SPDX-License-Identifier: Apache-2.0
"""Tables and the result file of `bench.answers`."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.answers.scenes import PLAIN
from bench.answers.settings import AS_STREAM, STREAM
from bench.common import tables

DRAWS = 2000
"""Of the bootstrap."""

Result = dict[str, Any]
GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "photo, nothing moves": lambda scene: (
        scene["kind"] == "photo" and scene["camera"] == PLAIN and scene["cut"] is None
    ),
    "photo, moving camera": lambda scene: (
        scene["kind"] == "photo" and scene["camera"] != PLAIN and scene["cut"] is None
    ),
    "real clip": lambda scene: scene["kind"] == "clip" and scene["cut"] is None,
    "cut": lambda scene: scene["cut"] is not None,
    "plain light": lambda scene: scene["light"] == PLAIN,
    "noise or h264": lambda scene: scene["light"] in ("noise", "h264"),
    "changing light": lambda scene: scene["light"] in ("exposure steps", "flicker", "slow light"),
}
"""Scenes by what is behind the objects, and by what spoils them. Of scenes with a cut, light is that of the first."""


class Answers:
    """The answers of a result, by model and way.

    Args:
        result: What `bench.answers.run.measure` returns.
    """

    def __init__(self, result: Result) -> None:
        self.result = result
        self.tasks = [task for scene in result["scenes"] for task, _, _ in scene["questions"]]
        self.right_words = [answer for scene in result["scenes"] for _, _, answer in scene["questions"]]
        self.scene_of = np.repeat(np.arange(len(result["scenes"])), [len(s["questions"]) for s in result["scenes"]])
        by: dict[tuple[str, str, str, str, float], list[np.ndarray]] = {}
        for point in result["points"]:
            key = (point["model"], point["selection"], point["positions"], point["tower"], point["rate"])
            by.setdefault(key, []).append(np.array([each == "1" for each in point["right"]], dtype=float))
        self._shares = {key: np.mean(values, axis=0) for key, values in by.items()}
        self._dense = tuple(result["settings"]["ways"][0])
        count = len(result["scenes"])
        drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
        self._weights = np.stack([np.bincount(each, minlength=count) for each in drawn])

    def shares(self, model: str, way: Sequence[str], rate: float) -> np.ndarray | None:
        """(Q,) share of the seeds that answer each question rightly, or None where that was not asked."""
        selection, positions, tower = way if rate else self._dense
        return self._shares.get((model, selection, positions, tower, rate))

    def interval(self, values: np.ndarray) -> float:
        """Half the width of the 95 % interval of a mean over questions, in points, by drawing scenes again."""
        count = len(self.result["scenes"])
        sums = np.bincount(self.scene_of, values, count)
        numbers = np.bincount(self.scene_of, minlength=count)
        means = (self._weights @ sums) / (self._weights @ numbers)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(100 * (high - low) / 2)

    def most_frequent(self) -> float:
        """The share of right answers, in %, of whoever gives to each kind of question its most frequent answer."""
        found = 0
        for task in set(self.tasks):
            words = Counter(w for w, t in zip(self.right_words, self.tasks, strict=True) if t == task)
            found += words.most_common(1)[0][1]
        return 100 * found / len(self.tasks)


def markdown(result: Result) -> str:
    """All tables."""
    settings, environment, told = result["settings"], result["environment"], Answers(result)
    rates, models = [0.0, *settings["ask_rates"]], settings["models"]
    lines = [
        "# What a small language model on a pretrained tower answers", "",
        f"{len(told.tasks)} questions about {len(result['scenes'])} scenes ({settings['ask']}) of {settings['units']} "
        f"units of {settings['grid'][0]} x {settings['grid'][1]} tokens; {len(settings['seeds'])} seed(s) of a model "
        f"of {result['weights'] / 1e6:.1f} million weights, trained on views of {settings['train_scenes']} other "
        f"scenes; {result['seconds']} s; {environment['time_utc']}; `{environment['command']}`", "",
        "Right answers in %, mean over the seeds; ± is half of the 95 % interval of drawing scenes again. Whoever "
        f"gives to each kind of question its most frequent answer has {told.most_frequent():.1f} %.",
    ]  # fmt: skip
    for model in models:
        lines += ["", f"## {model}", "", *_accuracies(told, model, rates)]
    lines += ["", "## Differences, paired", "", *_differences(told, models, settings)]
    for rate in settings["ask_rates"][1:] or settings["ask_rates"]:
        lines += ["", f"## base by kind of question, q={rate:g}", "", *_by_task(told, rate)]
        lines += ["", f"## base by scene, q={rate:g}", "", *_by_group(told, rate)]
    if any(row["selection"] == STREAM for row in result.get("kept", ())):
        lines += ["", "## Tokens that stay, %", "", *_kept(result)]
    if result["computed"]:
        lines += ["", "## Tokens that the tower computes, %", "", *_computed(result)]
    return "\n".join(lines) + "\n"


def _accuracies(told: Answers, model: str, rates: Sequence[float]) -> list[str]:
    cells = []
    for way in told.result["settings"]["ways"]:
        cells.append(list(way))
        for rate in rates:
            shares = told.shares(model, way, rate)
            cells[-1].append("" if shares is None else f"{100 * shares.mean():.1f} ± {told.interval(shares):.1f}")
    return tables.markdown(["tokens", "positions", "tower", *(f"q={rate:g}" for rate in rates)], cells, "lllr")


def _differences(told: Answers, models: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """Points by which one is above the other, on the same questions.

    Selections are compared with the first one, other positions and towers with those of the same selection, a stream
    with one clip of as many tokens.
    """
    first, plain = settings["ways"][0], ["keep", "full"]
    pairs: list[tuple[str, tuple[str, Sequence[str]], tuple[str, Sequence[str]]]] = []
    for way in settings["ways"][1:]:
        better = first if way[1:] == plain else [way[0], *plain]
        if way[0] == STREAM:
            better = [AS_STREAM, *way[1:]]
        if better in settings["ways"]:
            pairs.append((f"base: {', '.join(better)} above {', '.join(way)}", ("base", better), ("base", way)))
    pairs += [(f"{model} above base, {', '.join(first)}", (model, first), ("base", first)) for model in models[1:]]
    if "control" in models and "uptrained" in models:
        for way in [way for way in settings["ways"] if way[2] == "full" and way[1] == "keep"]:
            pairs.append((f"uptrained above control, {', '.join(way)}", ("uptrained", way), ("control", way)))
    rates, cells = [0.0, *settings["ask_rates"]], []
    for what, one, other in pairs:
        cells.append([what])
        for rate in rates:
            a, b = told.shares(*one, rate), told.shares(*other, rate)
            both = a is not None and b is not None and (rate or one[0] != other[0])
            cells[-1].append(f"{100 * (a - b).mean():+.1f} ± {told.interval(a - b):.1f}" if both else "")  # type: ignore[operator]
    dense = told.shares("base", first, 0.0)
    for way in [way for way in settings["ways"] if way[1:] == plain]:
        cells.append([f"base: nothing dropped above {', '.join(way)}", ""])
        for rate in rates[1:]:
            shares = told.shares("base", way, rate)
            if dense is not None and shares is not None:
                cells[-1].append(f"{100 * (dense - shares).mean():+.1f} ± {told.interval(dense - shares):.1f}")
    return tables.markdown(["", *(f"q={rate:g}" for rate in rates)], cells, "lr")


def _plain(told: Answers) -> list[Sequence[str]]:
    return [way for way in told.result["settings"]["ways"] if tuple(way[1:]) == ("keep", "full")]


def _means(told: Answers, rate: float, columns: Sequence[np.ndarray]) -> list[list[str]]:
    """A line for what is right of each column's questions when nothing is dropped, then one per selection."""
    lines = []
    for name, way, at in [("nothing dropped", None, 0.0), *((way[0], way, rate) for way in _plain(told))]:
        shares = told.shares("base", way or _plain(told)[0], at)
        if shares is not None:
            lines.append([name, *(f"{100 * shares[some].mean():.1f}" if some.any() else "" for some in columns)])
    return lines


def _by_task(told: Answers, rate: float) -> list[str]:
    tasks = sorted(set(told.tasks))
    columns = [np.array([each == task for each in told.tasks]) for task in tasks]
    head = ["tokens", *(f"{task} ({int(some.sum())})" for task, some in zip(tasks, columns, strict=True))]
    return tables.markdown(head, _means(told, rate, columns), "lr")


def _by_group(told: Answers, rate: float) -> list[str]:
    columns = [np.array([rule(scene) for scene in told.result["scenes"]])[told.scene_of] for rule in GROUPS.values()]
    head = ["tokens", *(f"{name} ({int(some.sum())})" for name, some in zip(GROUPS, columns, strict=True))]
    return tables.markdown(head, _means(told, rate, columns), "lr")


def _kept(result: Result) -> list[str]:
    by = {(row["selection"], row["rate"]): row["kept"] for row in result["kept"]}
    rates = result["settings"]["ask_rates"]
    names = dict.fromkeys(selection for selection, _ in by)
    cells = [[name, *(f"{100 * by[name, rate]:.1f}" for rate in rates)] for name in names]
    return tables.markdown(["tokens", *(f"q={rate:g}" for rate in rates)], cells, "lr")


def _computed(result: Result) -> list[str]:
    rates = result["settings"]["ask_rates"]
    by = {(row["selection"], row["tower"], row["rate"]): row["computed"] for row in result["computed"]}
    kinds = dict.fromkeys((selection, tower) for selection, tower, _ in by)
    cells = [[*kind, *(f"{100 * by[(*kind, rate)]:.0f}" for rate in rates)] for kind in kinds]
    return tables.markdown(["tokens", "tower", *(f"q={rate:g}" for rate in rates)], cells, "llr")


def write(result: Result, folder: Path) -> None:
    """Writes ``answers.json``, a line per row, and ``answers.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = ("scenes", "kept", "computed", "points")
    parts = [f' "{key}": {json.dumps(value)}' for key, value in result.items() if key not in listed]
    for key in listed:
        parts.append(f' "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in result[key]) + "\n ]")
    (folder / "answers.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (folder / "answers.md").write_text(markdown(result))
