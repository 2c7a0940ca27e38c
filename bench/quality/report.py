# SPDX-License-Identifier: Apache-2.0
"""What the answers of the quality lab say: bars, tables and a picture, read off the result alone."""

import math
import statistics
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import tables
from bench.common.targets import add_bar, table
from evs_vllm.train.synthetic import CONDITIONS, TASKS, TIMED

PLAIN = ("evs", "keep", "full")
"""What users get: selection, positions, tower."""
MOVING = ("light", "pan", "cuts")
"""Conditions in which more than the square changes."""
KINDS = {"square": TASKS, "scene": ("scene",)}
"""Tasks by what they ask about: what comes and goes at once, and what is behind it."""

Lines = dict[tuple[str, ...], dict[float, list[dict[str, Any]]]]


def lines_of(result: dict[str, Any]) -> Lines:
    """Points by line of the table (model, selection, positions, tower) and rate, one per seed."""
    lines: Lines = {}
    for point in result["points"]:
        key = (point["model"], point["selection"], point["positions"], point["tower"])
        lines.setdefault(key, {}).setdefault(point["rate"], []).append(point)
    return lines


class Answers:
    """Shares of right answers among some of the questions.

    Args:
        result: The content of the JSON file.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.lines = lines_of(result)
        self.questions: list[list[str]] = result["questions"]
        asked = {condition for condition, _ in self.questions}
        self.conditions = [condition for condition in CONDITIONS if condition in asked]

    def by_seed(
        self,
        model: str,
        way: Sequence[str],
        rate: float,
        conditions: Collection[str] = CONDITIONS,
        tasks: Collection[str] | None = None,
        of: str = "right",
    ) -> dict[int, float]:
        """In %, for each seed; empty where nothing of it was asked.

        Args:
            model: Which.
            way: Selection, positions, tower.
            rate: The rate; at 0 every way is what users get.
            conditions, tasks: Those whose questions count; all tasks by default.
            of: "right", or "shown" for what the kept tokens answer.
        """
        where = [
            number
            for number, (condition, task) in enumerate(self.questions)
            if condition in conditions and (tasks is None or task in tasks)
        ]
        points = self.lines.get((model, *(way if rate else PLAIN)), {}).get(rate, [])
        if not where:
            return {}
        return {point["seed"]: 100 * statistics.mean(point[of][n] == "1" for n in where) for point in points}

    def mean(self, *args: Any, **kwargs: Any) -> float | None:
        """The mean of `by_seed` over the seeds; None where nothing of it was asked."""
        values = self.by_seed(*args, **kwargs)
        return statistics.mean(values.values()) if values else None

    def above(self, one: tuple[Any, ...], other: tuple[Any, ...], **kwargs: Any) -> list[float]:
        """By how many points the first line is above the second, for each seed that has both."""
        first, second = self.by_seed(*one, **kwargs), self.by_seed(*other, **kwargs)
        return [first[seed] - second[seed] for seed in first if seed in second]

    def rates(self, model: str, way: Sequence[str]) -> list[float]:
        """At which rates a line was asked."""
        return sorted(self.lines.get((model, *way), {}))


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; 0 for one value."""
    if len(values) < 2:
        return 0.0
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def agreement(result: dict[str, Any], asked: dict[str, Any]) -> float:
    """In %, how many of the questions vLLM and transformers answer both right or both wrong."""
    (same,) = (
        point["right"]
        for point in lines_of(result)[asked["model"], *PLAIN][asked["rate"]]
        if point["seed"] == asked["seed"]
    )
    return 100 * statistics.mean(a == b for a, b in zip(same, asked["right"], strict=False))


# ---------------------------------------------------------------- bars


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's bars, for what the result has figures of; see `bench.common.targets` for the form."""
    answers = Answers(result)
    found: list[dict[str, Any]] = []
    add = partial(add_bar, found, unit=" points")

    def least(values: dict[Any, float | None]) -> tuple[Any, float | None]:
        known = {key: value for key, value in values.items() if value is not None}
        return min(known.items(), key=lambda item: item[1]) if known else (None, None)

    def ahead(gains: list[float]) -> float | None:
        return statistics.mean(gains) if gains else None

    where, dense = least({c: answers.mean("base", PLAIN, 0.0, [c]) for c in answers.conditions})
    add(f"base, nothing dropped, worst condition ({where})", dense, 95, unit=" %")
    quiet = [condition for condition in answers.conditions if condition not in MOVING]
    pruned = answers.above(("base", PLAIN, 0.0), ("base", PLAIN, 0.75), conditions=quiet)
    add(f"plug-in EVS below dense, q=0.75, {' and '.join(quiet)}", ahead(pruned), 1.5, at_most=True)
    gains = answers.above(("uptrained", PLAIN, 0.9), ("control", PLAIN, 0.9))
    add(f"uptrained above control, q=0.9 (95 % interval ± {interval(gains):.1f})", ahead(gains), 2)
    random = ("random_unit0", "keep", "full")
    add(
        "EVS above random tokens with unit 0, q=0.9",
        ahead(answers.above(("base", PLAIN, 0.9), ("base", random, 0.9))),
        15,
    )
    for model in ("base", "uptrained"):
        reuse = ("evs", "keep", "reuse")
        rate, worst = least(
            {
                rate: ahead(answers.above((model, reuse, rate), (model, PLAIN, rate)))
                for rate in answers.rates(model, reuse)
            }
        )
        if worst is not None:
            add(f"{model}: reuse below the full tower, worst rate (q={rate:g})", -worst, 0.5, at_most=True)
    paper = ("paper", "keep", "full")
    cell, worst = least({
        (condition, rate): ahead(answers.above(("base", PLAIN, rate), ("base", paper, rate), conditions=[condition]))
        for condition in answers.conditions
        for rate in answers.rates("base", paper)
    })  # fmt: skip
    if worst is not None:
        add(f"EVS below paper, worst condition and rate ({cell[0]}, q={cell[1]:g})", -worst, 1, at_most=True)
    for condition in MOVING:
        for rate in (0.75, 0.9):
            over = answers.above(("base", PLAIN, rate), ("base", paper, rate), conditions=[condition])
            add(f"EVS above paper, {condition}, q={rate:g} (95 % interval ± {interval(over):.1f})", ahead(over), 5)
    focus = ("focus", "keep", "full")
    for rate in answers.rates("base", focus):
        over = answers.above(("base", focus, rate), ("base", PLAIN, rate), tasks=TIMED)
        add(f"focus above none where a time is asked for, q={rate:g}", ahead(over), 1)
    for name in {point["model"]: None for point in result["engine"]}:
        shares = {point["rate"]: agreement(result, point) for point in result["engine"] if point["model"] == name}
        rate, share = least(dict(shares))
        add(f"{name}: vLLM and transformers agree, worst rate (q={rate:g})", share, 99.5, unit=" %")
    return found


# ---------------------------------------------------------------- tables


def markdown(result: dict[str, Any]) -> str:
    """The tables: mean shares of right answers in % over the seeds, with 95 % intervals where there are several."""
    answers = Answers(result)
    settings, environment = result["settings"], result["environment"]
    units, seeds = settings["curriculum"][-1][0], len(settings["seeds"])
    note = (
        f"Right answers in %. {settings['clips']} unseen clips of {units} units, as many of each condition, "
        f"{seeds} seed(s); {result['seconds']} s; {environment['time_utc']}; `{environment['command']}`"
    )
    parts = [note, "", "**All conditions**", "", *_all_conditions(answers)]
    parts += ["", "**By condition** (positions keep, tower full)", "", *_by_condition(answers)]
    parts += ["", "**The square and the scene behind it** (the base)", "", *_by_kind(answers)]
    if any(key[1] == "focus" for key in answers.lines):
        parts += ["", "**Focus on the time that is asked for** (the base, tasks " + " and ".join(TIMED) + ")", ""]
        parts += _with_focus(answers)
    return "\n".join([*parts, table(bars(result))]) + "\n"


def _text(values: dict[int, float]) -> str:
    if not values:
        return ""
    spread = f" ± {interval(list(values.values())):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{spread}"


def _rates(answers: Answers) -> list[float]:
    return answers.rates("base", PLAIN)


def _all_conditions(answers: Answers) -> list[str]:
    rates, rows = _rates(answers), []
    for model, *way in answers.lines:
        known = answers.rates(model, way)
        rows.append([model, *way, *(_text(answers.by_seed(model, way, q)) if q in known else "" for q in rates)])
        if (model, *way) == ("base", *PLAIN):
            shown = [_text(answers.by_seed(model, way, rate, of="shown")) for rate in rates]
            rows.append(["*answer still readable*", "evs", "", "", *shown])
        if model == "base" and way in (list(PLAIN), ["paper", *PLAIN[1:]]):
            # Of clips that are short at their rate "paper" keeps as few as vLLM would.
            kept = [f"{answers.lines[model, *way][q][0]['tokens']:g}" if q in known else "" for q in rates]
            rows.append(["*tokens kept*", way[0], "", "", *kept])
    return tables.markdown(["model", "tokens", "positions", "tower", *(f"q={q:g}" for q in rates)], rows, "llllr")


def _by_condition(answers: Answers) -> list[str]:
    rates, rows = _rates(answers), []
    for condition in answers.conditions:
        for model, *way in answers.lines:
            if tuple(way[1:]) != PLAIN[1:] or way[0] == "focus":
                continue
            known = answers.rates(model, way)
            cells = [_text(answers.by_seed(model, way, q, [condition])) if q in known else "" for q in rates]
            rows.append([condition, model, way[0], *cells])
        for selection in ("evs", "paper"):
            way = [selection, *PLAIN[1:]]
            known = answers.rates("base", way)
            cells = [
                _text(answers.by_seed("base", way, q, [condition], of="shown")) if q in known else "" for q in rates
            ]
            if known:
                rows.append([condition, "*readable*", selection, *cells])
    return tables.markdown(["condition", "model", "tokens", *(f"q={q:g}" for q in rates)], rows, "lllr")


def _by_kind(answers: Answers) -> list[str]:
    rates, rows = _rates(answers), []
    for condition in answers.conditions:
        for kind, tasks in KINDS.items():
            for selection in ("evs", "paper"):
                way = [selection, *PLAIN[1:]]
                known = answers.rates("base", way)
                cells = [
                    _text(answers.by_seed("base", way, q, [condition], tasks)) if q in known else "" for q in rates
                ]
                if any(cells):
                    rows.append([condition, kind, selection, *cells])
    return tables.markdown(["condition", "asked about", "tokens", *(f"q={q:g}" for q in rates)], rows, "lllr")


def _with_focus(answers: Answers) -> list[str]:
    focus = ["focus", *PLAIN[1:]]
    rates = answers.rates("base", focus)
    rows = []
    for condition in answers.conditions:
        cells = [_text(answers.by_seed("base", way, q, [condition], TIMED)) for q in rates for way in (PLAIN, focus)]
        rows.append([condition, *cells])
    return tables.markdown(["condition", *(f"q={q:g}, {n}" for q in rates for n in ("none", "focus"))], rows, "lr")


# ---------------------------------------------------------------- picture


def plot(result: dict[str, Any], path: Path) -> None:
    """Right answers against the rate, a panel for each condition: the base's ways to choose, EVS of other models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    answers = Answers(result)
    count = len(answers.conditions)
    figure, panels = pyplot.subplots(1, count, figsize=(2 + 3 * count, 4), sharey=True, squeeze=False)
    for axes, condition in zip(panels[0], answers.conditions, strict=True):
        for model, *way in answers.lines:
            if way[1:] != list(PLAIN[1:]) or way[0] == "focus" or (model != "base" and way[0] != "evs"):
                continue
            rates = sorted({0.0, *answers.rates(model, way)})
            means = [answers.mean(model, way, rate, [condition]) for rate in rates]
            axes.plot(rates, means, "o-" if model == "base" else "s--", markersize=4, label=f"{model}, {way[0]}")
        axes.set(title=condition, xlabel="share dropped", ylim=(0, 100))
        axes.grid(color="#DDDDDD")
    panels[0][0].set_ylabel("right answers, %")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
