# SPDX-License-Identifier: Apache-2.0
"""Which pixels a cell covers."""


def spans(size: int, cells: int) -> list[tuple[int, int]]:
    """First pixel of every cell along a side of ``size`` pixels, and one past its last."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
