# SPDX-License-Identifier: Apache-2.0
"""What `evaluate.py` found, as a table and a picture: accuracy and tokens against the rate."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import tables

HEAD = (
    "task", "variant", "rate", "accuracy", "of rate 0", "answers changed", "prompt tokens", "video tokens", "kept",
)  # fmt: skip


@dataclass
class Point:
    """A task at a rate.

    Attributes:
        task: as lmms-eval calls it.
        variant: of the settings; "" at rate 0.
        rate: that was asked for.
        error: why there are no figures, or None.
        metrics: the task's own, the main one first.
        questions: how many.
        prompt_tokens: of each question's prompt, as the server counts them.
        output_tokens: mean of the answers.
        videos: how many were sent.
        video_tokens, video_tokens_kept: of all videos, before and after, by the server's ``/metrics``; None at rate 0
            (not counted there), where it has none, or where somebody else was counted, too.
        answers: what was said to each question.
        seconds: for all of it.
    """

    task: str
    variant: str
    rate: float
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    questions: int = 0
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: float = 0.0
    videos: int = 0
    video_tokens: int | None = None
    video_tokens_kept: int | None = None
    answers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, float]:
        return self.task, self.variant, self.rate


@dataclass
class Row:
    """A group at a rate: plain means over its tasks; of the tokens, means over questions and videos."""

    group: str
    variant: str
    rate: float
    error: str | None = None
    accuracy: float = 0.0
    relative: float | None = None
    changed: float | None = None
    questions: int = 0
    prompt_tokens: float = 0.0
    tokens: float | None = None
    kept: float | None = None


def rows_of(groups: Mapping[str, Sequence[str]], points: Sequence[Point]) -> list[Row]:
    """The table: a row for each group, variant and rate that has all of its tasks."""
    by_key = {point.key: point for point in points}
    cells = list(dict.fromkeys((point.variant, point.rate) for point in points))
    rows = []
    for group, parts in groups.items():
        base: Row | None = None
        for variant, rate in cells:
            mine = [by_key[part, variant, rate] for part in parts if (part, variant, rate) in by_key]
            if not mine:
                continue
            row = Row(group, variant, rate)
            rows.append(row)
            wrong = [f"{point.task}: {point.error}" for point in mine if point.error is not None]
            if wrong or len(mine) < len(parts):
                row.error = wrong[0] if wrong else f"{len(mine)} of {len(parts)} tasks so far"
                continue
            _fill(row, mine, base, [by_key.get((part, "", 0.0)) for part in parts])
            base = base or (row if rate == 0 else None)
    return rows


def _fill(row: Row, points: Sequence[Point], base: Row | None, at_zero: Sequence[Point | None]) -> None:
    row.accuracy = statistics.mean(next(iter(point.metrics.values())) for point in points)
    row.questions = sum(point.questions for point in points)
    row.prompt_tokens = sum(sum(point.prompt_tokens) for point in points) / row.questions
    if base is not None:
        row.relative = row.accuracy / base.accuracy if base.accuracy else None
        pairs = [
            now != full
            for point, zero in zip(points, at_zero)
            if zero
            for now, full in zip(point.answers, zero.answers)
        ]
        row.changed = sum(pairs) / len(pairs) if pairs else None
    tokens, kept = [p.video_tokens for p in points], [p.video_tokens_kept for p in points]
    if None not in tokens and None not in kept:
        videos = sum(point.videos for point in points)
        row.tokens, row.kept = sum(filter(None, tokens)) / videos, sum(filter(None, kept)) / videos


def markdown(content: Mapping[str, Any]) -> str:
    """Everything as Markdown, from the content of a result file."""
    groups, points = content["groups"], [Point(**point) for point in content["points"]]
    cells = []
    for row in rows_of(groups, points):
        start = (row.group, row.variant, f"{row.rate:g}")
        if row.error is not None:
            cells.append((*start, f"no figure: {' '.join(row.error.split())[:300]}"))
            continue
        figures = [
            f"{row.accuracy:.4g}", _percent(row.relative), _percent(row.changed), f"{row.prompt_tokens:.0f}",
            "" if row.tokens is None else f"{row.tokens:.0f}", "" if row.kept is None else f"{row.kept:.0f}",
        ]  # fmt: skip
        cells.append((*start, *figures))
    lines = [*tables.markdown(HEAD, cells, "llr"), "", *_parts(groups, points), *_notes(content, groups, points)]
    return "\n".join(lines) + "\n"


def _parts(groups: Mapping[str, Sequence[str]], points: Sequence[Point]) -> list[str]:
    """The tasks of each group of several, and every further metric."""
    rows: list[list[str]] = []
    head: list[str] = []
    for parts in groups.values():
        for task in parts:
            mine = [point for point in points if point.task == task and point.error is None]
            metrics = list(mine[0].metrics) if mine else []
            for metric in metrics if len(parts) > 1 else metrics[1:]:
                told = [f"{point.metrics.get(metric, float('nan')):.4g}" for point in mine]
                rows.append([task, metric, *told])
                head = head or ["part", "metric", *(f"{point.variant} {point.rate:g}".strip() for point in mine)]
    return [*tables.markdown(head, rows, "llr"), ""] if rows else []


def _notes(content: Mapping[str, Any], groups: Mapping[str, Sequence[str]], points: Sequence[Point]) -> list[str]:
    """What one has to know to read the table."""
    good = [point for point in points if point.error is None]
    mains = dict.fromkeys(next(iter(point.metrics)) for point in good)
    several = [f"{name} is the plain mean of {len(parts)} tasks" for name, parts in groups.items() if len(parts) > 1]
    counts = {name: sum(p.questions for p in good if p.task in parts and not p.rate) for name, parts in groups.items()}
    environment, server = content["environment"], content["server"]
    seconds = sum(point.seconds for point in points)
    notes = [
        f"Accuracy is the task's own metric ({', '.join(mains)})" if mains else "No task gave a figure",
        *several,
        "questions: " + ", ".join(f"{name} {count}" for name, count in counts.items()),
        "tokens are means, of a prompt and of a video (the server's counters)",
    ]
    return [
        "; ".join(notes) + ".",
        "",
        f"{server['model']}, vLLM {server['vllm'] or '?'}, lmms-eval {server['lmms_eval'] or '?'}; "
        f"{environment['time_utc']}, {seconds / 60:.0f} minutes; `{environment['command']}`"
        + ("" if content["complete"] else "; **not complete**"),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}".replace("%", " %")


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Accuracy and tokens against the rate, both as a share of what they are at rate 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows_of(content["groups"], [Point(**p) for p in content["points"]]) if row.error is None]
    with pyplot.rc_context({"svg.hashsalt": "evs-vllm", "axes.grid": True, "grid.color": "#DDDDDD"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
        for group in content["groups"]:
            zero = next((row for row in rows if row.group == group and row.rate == 0), None)
            if zero is None:
                continue
            for variant in dict.fromkeys(row.variant for row in rows if row.group == group and row.rate):
                mine = [zero, *(row for row in rows if row.group == group and row.variant == variant)]
                label = group if variant == "default" else f"{group}, {variant}"
                rates = [row.rate for row in mine]
                if zero.accuracy:
                    left.plot(rates, [100 * row.accuracy / zero.accuracy for row in mine], marker="o", label=label)
                right.plot(
                    rates, [100 * row.prompt_tokens / zero.prompt_tokens for row in mine], marker="o", label=label
                )
        left.set(xlabel="share of video tokens dropped", ylabel="accuracy, % of that at rate 0")
        right.set(xlabel="share of video tokens dropped", ylabel="prompt tokens, % of those at rate 0", ylim=(0, None))
        if right.lines:
            right.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def brief(point: Point) -> str:
    """One line for the terminal."""
    name, value = next(iter(point.metrics.items()))
    tokens = statistics.mean(point.prompt_tokens)
    return f"{name} {value:.4g}, {point.questions} questions, {tokens:.0f} prompt tokens, {point.seconds:.0f} s"
