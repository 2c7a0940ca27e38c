# SPDX-License-Identifier: Apache-2.0
"""Where the cells of a grid begin and end."""

import numpy as np

ONE = 256  # parts of a pixel


def edges(pixels: int, cells: int) -> np.ndarray:
    """(cells + 1,) int64: the edges of cells along a side, in 256ths of a pixel."""
    return np.arange(cells + 1, dtype=np.int64) * pixels * ONE // cells
