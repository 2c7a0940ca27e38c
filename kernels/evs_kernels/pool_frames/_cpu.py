# SPDX-License-Identifier: Apache-2.0
"""numba pool_frames: whole rows of pixels are added as vectors, then columns; split over threads by row of cells."""

import numpy as np
import torch

from .._numba import njit
from .._parallel import for_ranges
from ._edges import edges

# Below this much input a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024
# Rows that the narrow sums take: 257 * 255 < 2**16; and the wide ones, in weights of 256: 2**16 * 2**8 * 255 < 2**32.
_NARROW, _WIDE = 257, 2**16
# A quotient below 256 of integers, the divisor below this, is nowhere rounded up to the next integer as a float64.
_EXACT = 2**44


@njit()
def _add_one(sums, a):
    for x in range(sums.shape[0]):
        sums[x] += a[x]


@njit()
def _add_two(sums, a, b):
    for x in range(sums.shape[0]):
        sums[x] += np.uint16(a[x]) + b[x]


@njit()
def _add_four(sums, a, b, c, d):
    for x in range(sums.shape[0]):
        sums[x] += np.uint16(a[x]) + b[x] + c[x] + d[x]


@njit()
def _add_part(sums, a, weight):
    for x in range(sums.shape[0]):
        sums[x] += np.uint32(a[x]) * np.uint32(weight)


@njit()
def _add_part_of_two(sums, a, b, weight):
    for x in range(sums.shape[0]):
        sums[x] += (np.uint32(a[x]) + np.uint32(b[x])) * np.uint32(weight)


@njit()
def _widen(sums, narrow):
    for x in range(sums.shape[0]):
        sums[x] += np.uint32(narrow[x]) << np.uint32(8)
        narrow[x] = 0


@njit()
def _add_columns(sums, across, totals):
    """Adds to (columns, channels) totals what lies in each; empties the sums."""
    columns, channels = totals.shape
    for j in range(columns):
        first, last = across[j] >> 8, (across[j + 1] - 1) >> 8
        if channels == 3 and first < last:
            red = green = blue = np.int64(0)
            for x in range(np.uintp(3 * first + 3), np.uintp(3 * last), np.uintp(3)):
                red += np.int64(sums[x])
                green += np.int64(sums[x + np.uintp(1)])
                blue += np.int64(sums[x + np.uintp(2)])
            left, right = (first + 1) * 256 - across[j], across[j + 1] - last * 256
            for channel, total in enumerate((red, green, blue)):
                total = (total << 8) + left * np.int64(sums[3 * first + channel])
                totals[j, channel] += total + right * np.int64(sums[3 * last + channel])
            continue
        for channel in range(channels):
            if first == last:
                total = (across[j + 1] - across[j]) * np.int64(sums[first * channels + channel])
            else:
                total = np.int64(0)
                for x in range(first + 1, last):
                    total += np.int64(sums[x * channels + channel])
                total = (total << 8) + ((first + 1) * 256 - across[j]) * np.int64(sums[first * channels + channel])
                total += (across[j + 1] - last * 256) * np.int64(sums[last * channels + channel])
            totals[j, channel] += total
    sums[:] = 0


@njit()
def _write_means(totals, weights, height, out):
    """Means of a row of cells whose pixels weigh ``weights`` times ``height``, rounded half up."""
    if 2 * height * weights.max() < _EXACT:
        for k in range(totals.shape[0]):
            weight = height * weights[k]
            out[k] = np.uint8(np.float64(2 * totals[k] + weight) / np.float64(2 * weight))
    else:
        for k in range(totals.shape[0]):
            weight = height * weights[k]
            out[k] = (2 * totals[k] + weight) // (2 * weight)


@njit()
def _pool(frames, begin, end, down, across, unit_frames, weights, pooled):
    """Writes rows of cells [begin, end) of all units; frames are (F, H, W * C), weights those of (columns * C)."""
    count, line = frames.shape[0], frames.shape[2]
    rows, columns = down.shape[0] - 1, across.shape[0] - 1
    narrow, wide = np.zeros(line, np.uint16), np.zeros(line, np.uint32)
    totals = np.zeros((columns, pooled.shape[1] // columns), np.int64)
    for n in range(begin, end):
        unit, start, stop = n // rows, down[n % rows], down[n % rows + 1]
        in_narrow = in_wide = 0
        totals[:] = 0
        for frame in range(0, unit_frames, 2):
            both = frame + 1 < unit_frames
            first = frames[min(unit * unit_frames + frame, count - 1)]
            second = frames[min(unit * unit_frames + frame + 1, count - 1)]
            y = start >> 8
            while y << 8 < stop:
                weight = min(stop, (y + 1) << 8) - max(start, y << 8)
                two = weight == 256 and (y + 2) << 8 <= stop
                if in_wide + in_narrow + 4 > _WIDE:
                    _widen(wide, narrow)
                    _add_columns(wide, across, totals)
                    in_narrow = in_wide = 0
                elif in_narrow + 4 > _NARROW:
                    _widen(wide, narrow)
                    in_wide, in_narrow = in_wide + in_narrow, 0
                if weight < 256:
                    in_wide += 1 + both
                    if both:
                        _add_part_of_two(wide, first[y], second[y], weight)
                    else:
                        _add_part(wide, first[y], weight)
                else:
                    in_narrow += (1 + both) * (1 + two)
                    if both and two:
                        _add_four(narrow, first[y], first[y + 1], second[y], second[y + 1])
                    elif both or two:
                        _add_two(narrow, first[y], second[y] if both else first[y + 1])
                    else:
                        _add_one(narrow, first[y])
                y += 1 + two
        if in_narrow:
            _widen(wide, narrow)
        _add_columns(wide, across, totals)
        _write_means(totals.reshape(-1), weights, (stop - start) * unit_frames, pooled[n])


def run(frames: torch.Tensor, rows: int, columns: int, unit_frames: int) -> torch.Tensor:
    """See evs_kernels.pool_frames."""
    count, height, width, channels = frames.shape
    units = -(-count // unit_frames)
    pooled = torch.empty((units, rows, columns, channels), dtype=torch.uint8)
    pictures, out = frames.view(count, height, -1).numpy(), pooled.view(units * rows, -1).numpy()
    down, across = edges(height, rows), edges(width, columns)
    weights = np.repeat(np.diff(across), channels)
    grain = _GRAIN_BYTES * rows // (unit_frames * frames[0].numel())
    for_ranges(
        lambda lo, hi: _pool(pictures, lo, hi, down, across, unit_frames, weights, out), 0, units * rows, grain=grain
    )
    return pooled
