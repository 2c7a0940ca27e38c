# SPDX-License-Identifier: Apache-2.0
"""Tables, bars and the result file of `bench.selection`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import tables
from bench.common.targets import add_bar, table
from bench.selection.conditions import CONDITIONS
from bench.selection.measures import MEASURES
from bench.selection.ways import AS_MANY, CAUSAL

PAPER = "paper"
"""The selection that the others are compared with."""
PLAIN = next(iter(CONDITIONS))
BARS = {0.75: 0.65, 0.9: 0.75}
"""By rate, how much of the paper's loss a selection of the package may have at most, by either measure."""

Rows = Sequence[dict[str, Any]]


def mean_of(rows: Rows, figure: str, **wanted: Any) -> float:
    """The mean of a figure over the rows that have what is wanted."""
    return statistics.fmean(row[figure] for row in rows if wanted.items() <= row.items())


def ratio(rows: Rows, measure: str, selection: str, **wanted: Any) -> float:
    """A mean loss as a share of the paper's."""
    return mean_of(rows, measure, selection=selection, **wanted) / mean_of(rows, measure, selection=PAPER, **wanted)


def distinct(rows: Rows, key: str) -> list[Any]:
    """The values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's bars, for every selection of the package but the paper's."""
    found: list[dict[str, Any]] = []
    rows, settings = result["rows"], result["settings"]
    if PAPER not in settings["selections"]:
        return found
    for selection in settings["selections"]:
        for rate, most in BARS.items():
            if selection == PAPER or rate not in settings["rates"]:
                continue
            for measure in MEASURES:
                for where, some in ((PLAIN, {"condition": PLAIN}), ("all conditions", {})):
                    what = f"{selection}, {where}, q={rate:g}: {measure} over the paper's"
                    measured = ratio(rows, measure, selection, rate=rate, **some)
                    add_bar(found, what, measured, most, at_most=True, unit="")
    return found


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    rows, settings, environment = result["rows"], result["settings"], result["environment"]
    clips, rates, conditions = settings["clips"], settings["rates"], settings["conditions"]
    lines = [
        "# Which tokens to keep, as a pretrained tower sees it", "",
        f"{len(distinct(rows, 'clip'))} clips ({clips}), {len(conditions)} conditions, at equal numbers of tokens; "
        f"{result['seconds']} s; {environment['time_utc']}; `{environment['command']}`", "",
        "Losses are 1 - cosine x 1000, lower is better. *hold*: a token against the last kept one of its place. "
        "*coverage*: against the nearest kept one, at any place, within 4 units. Mean over tokens, then over clips.",
    ]  # fmt: skip
    for title, some in ((f"Clips {PLAIN}", {"condition": PLAIN}), ("All conditions", {})):
        lines += ["", f"## {title}", "", *_losses(rows, rates, some)]
        if PAPER in settings["selections"]:
            lines += ["", f"### {title}: loss over that of `{PAPER}`", "", *_ratios(rows, rates, some)]
        lines += ["", f"### {title}: the worst of it", "", *_tails(rows, rates, some)]
    for rate in [rate for rate in rates if rate in BARS] or rates[:1]:
        lines += ["", f"## By condition, q={rate:g}: hold / coverage", ""]
        lines += _crossed(rows, "condition", rate=rate)
        lines += ["", f"## By clip, {PLAIN}, q={rate:g}: hold / coverage", ""]
        lines += _crossed(rows, "clip", rate=rate, condition=PLAIN)
    if result.get("causal"):
        lines += ["", "## The causal budget", "", *_causal(result["causal"], rates, conditions)]
    if result["drift"]:
        lines += ["", "## Drift of a tower that reuses keys and values", "", *_drift(result["drift"])]
    return "\n".join(lines) + "\n" + table(bars(result)) + "\n"


def _losses(rows: Rows, rates: Sequence[float], some: dict[str, Any]) -> list[str]:
    """Both measures, a line per selection."""
    head = ["selection", *(f"{measure} {rate:g}" for measure in MEASURES for rate in rates)]
    cells = [
        [way, *(f"{1000 * mean_of(rows, measure, selection=way, rate=rate, **some):.0f}"
                for measure in MEASURES for rate in rates)]
        for way in distinct(rows, "selection")
    ]  # fmt: skip
    return tables.markdown(head, cells, "lr")


def _ratios(rows: Rows, rates: Sequence[float], some: dict[str, Any]) -> list[str]:
    head = ["selection", *(f"{measure} {rate:g}" for measure in MEASURES for rate in rates)]
    cells = [
        [way, *(f"{ratio(rows, measure, way, rate=rate, **some):.2f}" for measure in MEASURES for rate in rates)]
        for way in distinct(rows, "selection")
        if way != PAPER
    ]
    return tables.markdown(head, cells, "lr")


def _tails(rows: Rows, rates: Sequence[float], some: dict[str, Any]) -> list[str]:
    """The cosine that 5 % of the tokens do not reach, and the loss of the worst unit."""
    head = ["selection", *(f"{measure} {rate:g}" for measure in MEASURES for rate in rates)]
    cells = [
        [way, *(f"{mean_of(rows, f'{measure}_p05', selection=way, rate=rate, **some):.2f} / "
                f"{1000 * mean_of(rows, f'{measure}_worst_unit', selection=way, rate=rate, **some):.0f}"
                for measure in MEASURES for rate in rates)]
        for way in distinct(rows, "selection")
    ]  # fmt: skip
    note = (
        "Cosine that 5 % of a clip's tokens do not reach, higher is better, and loss of its worst unit; "
        "means over the clips."
    )
    return [note, "", *tables.markdown(head, cells, "lr")]


def _crossed(rows: Rows, key: str, **some: Any) -> list[str]:
    """Both measures, a column per value of `key`."""
    values = distinct(rows, key)
    cells = [
        [way, *(" / ".join(f"{1000 * mean_of(rows, measure, selection=way, **some | {key: value}):.0f}"
                           for measure in MEASURES) for value in values)]
        for way in distinct(rows, "selection")
    ]  # fmt: skip
    return tables.markdown(["selection", *values], cells, "lr")


def _causal(rows: Rows, rates: Sequence[float], conditions: Sequence[str]) -> list[str]:
    """What it keeps, and both measures beside the budget of the clip with as many tokens."""
    cells = []
    for title, some in (("all", {}), *((condition, {"condition": condition}) for condition in conditions)):
        cells.append([title])
        for rate in rates:
            mine = [row for row in rows if row["rate"] == rate and some.items() <= row.items()]
            kept = statistics.fmean(row["kept"] / row["tokens"] for row in mine)
            pairs = (
                " / ".join(f"{1000 * mean_of(mine, measure, selection=way):.0f}" for way in (CAUSAL, AS_MANY))
                for measure in MEASURES
            )
            cells[-1].append(f"{kept:.1%}: {', '.join(pairs)}")
    note = (
        "`learned` with `budget=causal`: share of the tokens that it keeps: hold of it / of the budget of the clip "
        "with as many tokens, coverage of it / of that."
    )
    return [note, "", *tables.markdown(["condition", *(f"q={rate:g}" for rate in rates)], cells, "lr")]


def _drift(rows: Rows) -> list[str]:
    """Mean and tail of the cosine, and the cost, a line per way."""
    rates = distinct(rows, "rate")
    cells = []
    for way in distinct(rows, "way"):
        cells.append([way])
        for rate in rates:
            cosine, tail, share = (
                mean_of(rows, figure, way=way, rate=rate)
                for figure in ("centred_cosine", "centred_cosine_p05", "computed")
            )
            mine = [row for row in rows if (row["way"], row["rate"]) == (way, rate)]
            worst = min(mine, key=lambda row: row["centred_cosine"])
            cells[-1].append(f"{cosine:.3f} / {tail:.2f} / {share:.0%} / {worst['centred_cosine']:.2f} {worst['clip']}")
    note = (
        "Cosine to the full tower's patches, without the clip's mean patch, of the kept tokens after unit 0: mean / "
        "what 5 % of the patches do not reach / share of the tokens computed / the mean of the worst clip. "
        "In JSON also with unit 0, which is exact."
    )
    return [note, "", *tables.markdown(["tower", *(f"q={rate:g}" for rate in rates)], cells, "lr")]


def write(result: dict[str, Any], folder: Path) -> None:
    """Writes ``selection.json``, a line per row, ``selection.md`` and the pictures."""
    from bench.selection.plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    listed = {key: result[key] for key in ("rows", "causal", "drift")}
    # One line per row: the file is read in differences, too.
    parts = [f' "{key}": {json.dumps(value)}' for key, value in result.items() if key not in listed]
    for key, values in listed.items():
        rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in values]
        parts.append(f' "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rounded) + "\n ]")
    (folder / "selection.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (folder / "selection.md").write_text(markdown(result))
    plot(result, folder)
