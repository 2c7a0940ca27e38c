# SPDX-License-Identifier: Apache-2.0
"""Text for the terminal: tables, bars, numbers."""

import sys
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Lines of columns as wide as their widest cell.

    Args:
        rows: Rows of equally many cells.
        right: Columns to align to the right.
        gap: What stands between columns.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        (cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )
    return [gap.join(cells).rstrip() for cells in aligned]


def bar(share: float, width: int) -> str:
    """A horizontal bar: `share` (0..1) of `width` characters, to an eighth of a character; what is not zero shows."""
    if not _can_print("█"):
        return "#" * max(round(share * width), 1 if share > 0 else 0)
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def seconds(value: float) -> str:
    """A duration to three digits: 1.23 s, 45.6 ms, 0.078 ms."""
    if value >= 1:
        return f"{value:.2f} s"
    ms = 1e3 * value
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
