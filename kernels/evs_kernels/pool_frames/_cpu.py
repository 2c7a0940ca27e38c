# SPDX-License-Identifier: Apache-2.0
"""numba pool_frames: whole rows of pixels are added as vectors, then the columns; split over threads by row of cells."""

import numpy as np
import torch

from .._numba import njit
from .._parallel import for_ranges

# Below this much input a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024
# Rows that the narrow sums take: 257 * 255 < 2**16; and the wide ones, in weights of 256: 2**16 * 2**8 * 255 < 2**32.
_NARROW, _WIDE = 257, 2**16


@njit()
def _add(sums, row):
    for x in range(sums.shape[0]):
        sums[x] += row[x]


@njit()
def _add_two(sums, row, other):
    for x in range(sums.shape[0]):
        sums[x] += np.uint16(row[x]) + other[x]


@njit()
def _add_part(sums, row, weight):
    for x in range(sums.shape[0]):
        sums[x] += np.uint32(row[x]) * np.uint32(weight)


@njit()
def _widen(sums, narrow):
    for x in range(sums.shape[0]):
        sums[x] += np.uint32(narrow[x]) << np.uint32(8)
        narrow[x] = 0


@njit()
def _add_columns(sums, edges, totals):
    """Adds to (columns, channels) totals what lies in each; empties the sums."""
    columns, channels = totals.shape
    for j in range(columns):
        first, last = edges[j] >> 8, (edges[j + 1] - 1) >> 8
        for channel in range(channels):
            if first == last:
                total = (edges[j + 1] - edges[j]) * np.int64(sums[first * channels + channel])
            else:
                total = np.int64(0)
                for x in range(first + 1, last):
                    total += np.int64(sums[x * channels + channel])
                total = (total << 8) + ((first + 1) * 256 - edges[j]) * np.int64(sums[first * channels + channel])
                total += (edges[j + 1] - last * 256) * np.int64(sums[last * channels + channel])
            totals[j, channel] += total
    sums[:] = 0


@njit()
def _pool(frames, begin, end, rows_edges, columns_edges, unit_frames, pooled):
    """Writes rows of cells [begin, end) of all units; frames are (F, H, W * C)."""
    count, line = frames.shape[0], frames.shape[2]
    rows, columns, channels = rows_edges.shape[0] - 1, pooled.shape[1], pooled.shape[2]
    narrow, wide = np.zeros(line, np.uint16), np.zeros(line, np.uint32)
    totals = np.zeros((columns, channels), np.int64)
    for n in range(begin, end):
        unit, start, stop = n // rows, rows_edges[n % rows], rows_edges[n % rows + 1]
        in_narrow = in_wide = 0
        totals[:] = 0
        for frame in range(unit * unit_frames, (unit + 1) * unit_frames):
            picture = frames[min(frame, count - 1)]
            y = start >> 8
            while y << 8 < stop:
                weight = min(stop, (y + 1) << 8) - max(start, y << 8)
                if in_wide + in_narrow + 2 > _WIDE:
                    _widen(wide, narrow)
                    _add_columns(wide, columns_edges, totals)
                    in_narrow = in_wide = 0
                if weight < 256:
                    _add_part(wide, picture[y], weight)
                    in_wide += 1
                    y += 1
                    continue
                if in_narrow + 2 > _NARROW:
                    _widen(wide, narrow)
                    in_wide += in_narrow
                    in_narrow = 0
                if (y + 2) << 8 <= stop:
                    _add_two(narrow, picture[y], picture[y + 1])
                    in_narrow += 2
                    y += 2
                else:
                    _add(narrow, picture[y])
                    in_narrow += 1
                    y += 1
        if in_narrow:
            _widen(wide, narrow)
        _add_columns(wide, columns_edges, totals)
        height = (stop - start) * unit_frames
        for j in range(columns):
            weight = height * (columns_edges[j + 1] - columns_edges[j])
            for channel in range(channels):
                pooled[n, j, channel] = (2 * totals[j, channel] + weight) // (2 * weight)


def run(frames: torch.Tensor, rows: int, columns: int, unit_frames: int) -> torch.Tensor:
    """See evs_kernels.pool_frames."""
    count, height, width, channels = frames.shape
    units = -(-count // unit_frames)
    pooled = torch.empty((units, rows, columns, channels), dtype=torch.uint8)
    pictures, out = frames.view(count, height, -1).numpy(), pooled.view(-1, columns, channels).numpy()
    down, across = (
        np.array([i * pixels * 256 // cells for i in range(cells + 1)])
        for pixels, cells in ((height, rows), (width, columns))
    )
    grain = _GRAIN_BYTES * rows // (unit_frames * frames[0].numel())
    for_ranges(lambda lo, hi: _pool(pictures, lo, hi, down, across, unit_frames, out), 0, units * rows, grain=grain)
    return pooled
