# SPDX-License-Identifier: Apache-2.0
"""Bars of a benchmark: what was asked for and what was measured."""

from typing import Any

from bench.common.tables import markdown


def add_bar(
    found: list[dict[str, Any]],
    what: str,
    measured: float | None,
    asked: float | None,
    at_most: bool = False,
    unit: str = "x",
) -> None:
    """Adds a bar to `found`, in the form that `table` takes; none where nothing was measured."""
    if measured is None:
        return
    met = None if asked is None else measured <= asked if at_most else measured >= asked
    found.append({"what": what, "measured": measured, "asked": asked, "at_most": at_most, "met": met, "unit": unit})


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table of the bars."""
    if not found:
        return ""
    rows = []
    for bar in found:
        unit = f" {bar['unit']}" if bar["unit"] == "power" else bar["unit"]
        asked = "" if bar["asked"] is None else f"{'at most' if bar['at_most'] else 'at least'} {bar['asked']:g}{unit}"
        verdict = {True: "met", False: "missed", None: ""}[bar["met"]]
        rows.append((bar["what"], asked, f"{bar['measured']:.2f}{unit}", verdict))
    return "\n".join(["", "**Bars**", "", *markdown(("what", "asked", "measured", ""), rows, "lrrl")])
