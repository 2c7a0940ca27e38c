# SPDX-License-Identifier: Apache-2.0
"""numba resize_patches: of every token the columns first, into planes, then the rows, straight into patches.

What the columns' pass gives of the frames of a unit lies in scratch, for every column of tokens the last source rows
that a row of tokens needs; tokens below go on where those above ended. Split over threads by token.
"""

import numpy as np
import torch

from .. import _vectors as v
from .._memory import empty
from .._numba import njit
from .._parallel import for_ranges
from ._tables import LANES, LOW_BITS, across_of, down_of

# Below this much output a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024


@njit()
def _across_rgb(values, at, line, rows, first, weights, parts, column, pixels, taps, steps, bits, planes, to, partial):
    """Some source rows of one column of tokens, each as (3, pixels) values, one after another from planes[to];
    partial has room for sixteen sums of each, in each part of the weights."""
    half, pairs = 1 << bits >> 1, (taps + 1) // 2
    w = column * pixels // 4 * steps * pairs * 32
    for x in range(np.uintp(column * pixels), np.uintp((column + 1) * pixels), np.uintp(4)):
        a, b = at + first[x], at + first[x + np.uintp(1)]
        c, d = at + first[x + np.uintp(2)], at + first[x + np.uintp(3)]
        into = to
        # The same thing three times. With few steps, up to eight pixels, weights and sums stay in registers.
        if parts == 1 and steps == 1:
            w0, w2, w4 = v.load_pairs(weights, w), v.load_pairs(weights, w + 32), v.load_pairs(weights, w + 64)
            for _ in range(rows):
                read = v.groups(values, a, b, c, d)
                sums = v.dot(v.splat(half), v.rgb_pairs_0(read), w0)
                sums = v.dot(sums, v.rgb_pairs_2(read), w2)
                if pairs == 3:
                    sums = v.dot(sums, v.rgb_pairs_4(read), w4)
                v.store_planes(planes, into, pixels, v.to_bytes(sums, bits))
                into += 3 * pixels
                a, b, c, d = a + line, b + line, c + line, d + line
        elif parts == 1 and steps == 2 and pairs == 2:
            w0, w2 = v.load_pairs(weights, w), v.load_pairs(weights, w + 32)
            w4, w6 = v.load_pairs(weights, w + 64), v.load_pairs(weights, w + 96)
            for _ in range(rows):
                read, more = v.groups(values, a, b, c, d), v.groups(values, a + 12, b + 12, c + 12, d + 12)
                sums = v.dot(v.splat(half), v.rgb_pairs_0(read), w0)
                sums = v.dot(sums, v.rgb_pairs_2(read), w2)
                sums = v.dot(sums, v.rgb_pairs_0(more), w4)
                sums = v.dot(sums, v.rgb_pairs_2(more), w6)
                v.store_planes(planes, into, pixels, v.to_bytes(sums, bits))
                into += 3 * pixels
                a, b, c, d = a + line, b + line, c + line, d + line
        else:
            for at_sum in range(0, 16 * rows, 16):
                v.store(partial, at_sum, v.splat(half >> LOW_BITS if parts == 2 else half))
            for at_sum in range(16 * rows, 16 * rows * parts, 16):
                v.store(partial, at_sum, v.splat(0))
            for u in range(w, w + steps * pairs * 32, pairs * 32):
                for part in range(parts):
                    t = u + part * (weights.shape[0] - 32) // parts
                    w0, w2, w4 = v.load_pairs(weights, t), v.load_pairs(weights, t + 32), v.load_pairs(weights, t + 64)
                    skipped = 0
                    for at_sum in range(16 * rows * part, 16 * rows * (part + 1), 16):
                        read = v.groups(values, a + skipped, b + skipped, c + skipped, d + skipped)
                        sums = v.dot(v.load_sums(partial, at_sum), v.rgb_pairs_0(read), w0)
                        sums = v.dot(sums, v.rgb_pairs_2(read), w2)
                        if pairs == 3:
                            sums = v.dot(sums, v.rgb_pairs_4(read), w4)
                        v.store(partial, at_sum, sums)
                        skipped += line
                a, b, c, d = a + 3 * taps, b + 3 * taps, c + 3 * taps, d + 3 * taps
            for at_sum in range(0, 16 * rows, 16):
                sums = v.load_sums(partial, at_sum)
                if parts == 2:
                    sums = v.joined(sums, v.load_sums(partial, at_sum + 16 * rows), LOW_BITS)
                v.store_planes(planes, into, pixels, v.to_bytes(sums, bits))
                into += 3 * pixels
        w += steps * pairs * 32
        to += 4


@njit()
def _across_any(values, at, line, rows, first, weights, parts, column, pixels, taps, channels, bits, planes, to):
    """As `_across_rgb` for any number of channels, value by value."""
    half, low = 1 << bits >> 1, (weights.shape[0] - 32) // 2
    for _ in range(rows):
        for x in range(column * pixels, (column + 1) * pixels):
            for channel in range(channels):
                total = half
                for k in range(taps):
                    weight = np.int64(weights[x * taps + k])
                    if parts == 2:
                        weight = (weight << LOW_BITS) + weights[low + x * taps + k]
                    total += weight * values[at + first[x] + k * channels + channel]
                planes[to + channel * pixels] = min(max(total >> bits, 0), 255)
            to += 1
        to += (channels - 1) * pixels
        at += line


@njit()
def _prefetch(values, at, line, rows, size):
    """Asks for ``size`` values of some source rows: kept tokens lie about, and no CPU guesses where the next one is."""
    for _ in range(rows):
        for x in range(at, at + size + 63, 64):
            v.prefetch(values, x)
        at += line


@njit()
def _down(planes, at, patch_frames, frame_stride, merge, side, channels, pixels, slots, weights, row, bits, out, to):
    """Writes a token, and up to 15 values past its end."""
    half, taps, parts = 1 << bits >> 1, slots.shape[1], weights.shape[0]
    flat_slots, flat_weights = slots.reshape(-1), weights.reshape(-1)
    for patch in range(merge * merge):
        left, top = patch % merge * side, row + patch // merge * side
        for channel in range(channels):
            for frame in range(patch_frames):
                start = at + frame * frame_stride + channel * pixels + left
                for y in range(top, top + side):
                    for x in range(0, side, 16):
                        if parts == 1:
                            sums = v.splat(half)
                            for k in range(np.uintp(y * taps), np.uintp((y + 1) * taps)):
                                read = v.load_singles(planes, start + x + flat_slots[k])
                                sums = v.dot(sums, read, v.splat_pair(flat_weights, k))
                        else:
                            high, low = v.splat(half >> LOW_BITS), v.splat(0)
                            for k in range(np.uintp(y * taps), np.uintp((y + 1) * taps)):
                                read = v.load_singles(planes, start + x + flat_slots[k])
                                high = v.dot(high, read, v.splat_pair(flat_weights, k))
                                low = v.dot(low, read, v.splat_pair(flat_weights, k + np.uintp(slots.size)))
                            sums = v.joined(high, low, LOW_BITS)
                        # What is too much is written over by the next row.
                        v.store(out, to + x, v.to_bytes(sums, bits))
                    to += side


@njit()
def _resize(
    values, shape, tokens, merge, side, unit_frames,
    first, across_weights, parts, pixels, taps, steps, reach, across_bits,
    tops, bottoms, kept, slots, down_weights, down_bits, out,
):  # fmt: skip
    """Writes the rows of tokens, and up to 15 values past the last one's end."""
    count, height, width, channels = shape
    rows, columns = tops.shape[0], first.shape[0] // pixels
    per_row = channels * pixels
    block = kept * per_row
    planes = np.empty(unit_frames * columns * block + 32, np.uint8)
    line, per_unit, now = width * channels, rows * columns, -1
    span = first[pixels - 1] - first[0] + channels
    edge = np.zeros(line + reach, np.uint8)
    partial = np.empty(16 * kept * parts, np.int32)
    done = np.zeros((unit_frames, columns), np.int64)
    depth = merge * merge * channels * unit_frames * side * side
    for n in range(tokens.shape[0]):
        unit, row, column = tokens[n] // per_unit, tokens[n] % per_unit // columns, tokens[n] % columns
        if unit != now:
            now = unit
            done[:] = 0
        for frame in range(unit_frames):
            picture = min(unit * unit_frames + frame, count - 1) * height
            following = min(n + (frame + 1) // unit_frames, tokens.shape[0] - 1)
            ahead = min(tokens[following] // per_unit * unit_frames + (frame + 1) % unit_frames, count - 1) * height
            row_ahead, left = tokens[following] % per_unit // columns, first[tokens[following] % columns * pixels]
            top, bottom = tops[row_ahead], bottoms[row_ahead]
            _prefetch(values, (ahead + top) * line + left, line, bottom - top, span)
            to_block, y = (frame * columns + column) * block, max(done[frame, column], tops[row])
            while y < bottoms[row]:
                at, source = (picture + y) * line, values
                # As many rows at once as neither wrap around in scratch nor make a vector read past the last frame.
                some = min(bottoms[row] - y, kept - y % kept, (values.shape[0] - reach - at) // line + 1)
                if some < 1:
                    edge[:line] = values[at : at + line]
                    source, at, some = edge, 0, 1
                to = to_block + y % kept * per_row
                if channels == 3:
                    args = (first, across_weights, parts, column, pixels, taps, steps, across_bits, planes, to, partial)
                    _across_rgb(source, at, line, some, *args)
                else:
                    args = (first, across_weights, parts, column, pixels, taps, channels, across_bits, planes, to)
                    _across_any(source, at, line, some, *args)
                y += some
            done[frame, column] = bottoms[row]
        _down(
            planes, column * block, unit_frames, columns * block, merge, side, channels, pixels, slots, down_weights,
            row * merge * side, down_bits, out, n * depth,
        )  # fmt: skip


def run(
    frames: torch.Tensor,
    height: int,
    width: int,
    tokens: torch.Tensor,
    merge: int,
    side: int,
    unit_frames: int,
    arithmetic: str,
) -> torch.Tensor:
    """See evs_kernels.resize_patches."""
    channels, size = frames.shape[3], merge * side
    depth = merge**2 * channels * unit_frames * side**2
    rows = empty((len(tokens), depth))
    if not len(tokens):
        return rows
    across = across_of(frames.shape[2], width, size, channels, arithmetic)
    down = down_of(frames.shape[1], height, size, channels * across.pixels, arithmetic)
    values, shape, indices, out = frames.view(-1).numpy(), tuple(frames.shape), tokens.numpy(), rows.view(-1).numpy()
    settings = (merge, side, unit_frames, *across, *down)

    def body(lo: int, hi: int) -> None:
        # Vectors write past the end of a token: the last ones of a range go where there is room.
        middle = max(lo, hi - -(-LANES // depth))
        if middle > lo:
            _resize(values, shape, indices[lo:middle], *settings, out[lo * depth :])
        last = np.empty((hi - middle) * depth + LANES, np.uint8)
        _resize(values, shape, indices[middle:hi], *settings, last)
        out[middle * depth : hi * depth] = last[: (hi - middle) * depth]

    for_ranges(body, 0, len(tokens), grain=_GRAIN_BYTES // depth)
    return rows
