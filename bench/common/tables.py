# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, written one way by all benchmarks."""

from collections.abc import Sequence

RULES = {"l": "---", "r": "---:"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "l") -> list[str]:
    """The lines of a Markdown table.

    Args:
        header: The head of each column.
        rows: Cells as text; what a row lacks at its end stays empty.
        align: "l" or "r" for each column; the last letter also goes for those after it.
    """
    columns = len(header)
    rules = [RULES[letter] for letter in align[:columns].ljust(columns, align[-1])]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rules) + "|"]
    for row in rows:
        cells = [_cell(cell) for cell in row] + [""] * (columns - len(row))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its line: errors are shown in tables, too."""
    return " ".join(text.split()).replace("|", "/")
