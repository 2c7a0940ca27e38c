# SPDX-License-Identifier: Apache-2.0
"""The independent reference of the selections `learned` and `contrast`, in plain loops and whole numbers.

Nothing here comes from `evs_vllm` or `evs_kernels`, and nothing is fast; of the package it reads the numbers in
`learned.npz`. It starts from frames, so it knows nothing of the order of pixel rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = Path(__file__).parents[2] / "evs_vllm" / "core" / "learned.npz"
CELLS = 4
BLOCK = 32
"""Units of which a place's kept ones are chosen together."""

NOISE = {"contrast": 4, "learned": 20}
"""Thresholds: of a clip that goes on, what differs by less is no news."""

UNIT = {"contrast": Fraction(12 * 32, 100), "learned": Fraction(512, 100)}
"""The distance that a threshold of 1 means."""


def pictures(frames: np.ndarray, unit_frames: int, tops: Sequence[int], lefts: Sequence[int], side: int) -> np.ndarray:
    """Low-resolution pictures of tokens.

    Args:
        frames: (F, height, width, 3) uint8. The last one stands also for those that a whole last unit lacks.
        unit_frames: Frames in a unit.
        tops, lefts: First pixel row of every row of tokens, first pixel column of every column.
        side: Side of a token in pixels.

    Returns:
        (T, rows, columns, 4, 4, 3) int64: the mean of every cell, halves rounded up.
    """
    units = -(-len(frames) // unit_frames)
    out = np.empty((units, len(tops), len(lefts), CELLS, CELLS, 3), dtype=np.int64)
    for t in range(units):
        several = np.stack([frames[min(f, len(frames) - 1)] for f in range(t * unit_frames, (t + 1) * unit_frames)])
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                for i in range(CELLS):
                    for j in range(CELLS):
                        cell = several[
                            :,
                            top + math.floor(i * side / CELLS) : top + math.ceil((i + 1) * side / CELLS),
                            left + math.floor(j * side / CELLS) : left + math.ceil((j + 1) * side / CELLS),
                        ].astype(np.int64)
                        pixels = cell[..., 0].size
                        for colour in range(3):
                            mean = Fraction(int(cell[..., colour].sum()), pixels)
                            out[t, row, column, i, j, colour] = math.floor(mean + Fraction(1, 2))
    return out


def source_pictures(frames: np.ndarray, unit_frames: int, rows: int, columns: int) -> np.ndarray:
    """Low-resolution pictures of the tokens of a grid that is laid over frames of any size.

    A cell's edges are where it begins in the frame, cut off to 256ths of a pixel. A pixel that it covers in part counts
    by the part.

    Args:
        frames: (F, height, width, 3) uint8, before anything was resized.
        unit_frames: Frames in a unit.
        rows, columns: Of the grid.

    Returns:
        As `pictures`.
    """
    down, across = (_shares(size, CELLS * n) for size, n in zip(frames.shape[1:3], (rows, columns), strict=True))
    units = -(-len(frames) // unit_frames)
    out = np.empty((units, CELLS * rows, CELLS * columns, 3), dtype=np.int64)
    for t in range(units):
        several = [frames[min(f, len(frames) - 1)] for f in range(t * unit_frames, (t + 1) * unit_frames)]
        whole = np.sum([frame.astype(np.int64) for frame in several], axis=0)
        for i, (top, heights) in enumerate(down):
            for j, (left, widths) in enumerate(across):
                inside = whole[top : top + len(heights), left : left + len(widths)]
                weights = np.outer(heights, widths)
                area = int(weights.sum()) * unit_frames
                for colour in range(3):
                    mean = Fraction(int((inside[..., colour] * weights).sum()), area)
                    out[t, i, j, colour] = math.floor(mean + Fraction(1, 2))
    return out.reshape(units, rows, CELLS, columns, CELLS, 3).transpose(0, 1, 3, 2, 4, 5)


def _shares(size: int, cells: int) -> list[tuple[int, list[int]]]:
    """For each of `cells` along `size` pixels the first pixel in it, and how many 256ths of each pixel are."""
    edges = [i * size * 256 // cells for i in range(cells + 1)]
    out = []
    for begin, end in zip(edges, edges[1:], strict=False):
        pixels = range(begin // 256, -(-end // 256))
        out.append((pixels[0], [min(end, 256 * p + 256) - max(begin, 256 * p) for p in pixels]))
    return out


def normalised(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every cell less the mean around its token, over the deviation there; that mean; that deviation. In integers.

    The last quotient is fixed-point, 20 bits of a factor that is cut off: that is how it is defined.
    """
    units, rows, columns = cells.shape[:3]
    values = np.empty_like(cells)
    means, deviations = np.empty((2, units, rows, columns, 3), dtype=np.int64)
    for t in range(units):
        for row in range(rows):
            for column in range(columns):
                for colour in range(3):
                    count, total, squares = 0, 0, 0
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            weight = (2 - abs(down)) * (2 - abs(right))
                            at = min(max(row + down, 0), rows - 1), min(max(column + right, 0), columns - 1)
                            around = cells[t, at[0], at[1], :, :, colour].flatten().tolist()
                            count += weight * len(around)
                            total += weight * sum(around)
                            squares += weight * sum(value * value for value in around)
                    deviation = math.sqrt(count * squares - total * total) / count
                    factor = math.floor(32 * 2**20 // count / (deviation + 6))
                    means[t, row, column, colour] = math.floor(Fraction(total, count) + Fraction(1, 2))
                    deviations[t, row, column, colour] = round(deviation)
                    for i in range(CELLS):
                        for j in range(CELLS):
                            product = (int(cells[t, row, column, i, j, colour]) * count - total) * factor
                            value = math.floor(Fraction(product, 2**20) + Fraction(1, 2))
                            values[t, row, column, i, j, colour] = min(max(value, -127), 127)
    return values, means, deviations


def contrast(cells: np.ndarray) -> np.ndarray:
    """(T, P, 21) int64: 2 x 2 means of normalised cells, and three times each the mean colour around."""
    values, means, _ = normalised(cells)
    units, rows, columns = cells.shape[:3]
    out = []
    for token in np.ndindex(units, rows, columns):
        mine = []
        for i in (0, 2):
            for j in (0, 2):
                for colour in range(3):
                    four = values[token][i : i + 2, j : j + 2, colour]
                    mine.append(128 + math.floor(Fraction(int(four.sum()), 4) + Fraction(1, 2)))
        for colour in range(3):
            mine += [int(means[token][colour])] * 3
        out.append(mine)
    return np.array(out).reshape(units, rows * columns, -1)


@cache
def layers() -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Weights, biases and shifts of the learned descriptor, as int64."""
    numbers = np.load(WEIGHTS)
    return [
        (numbers[f"weight{i}"].astype(np.int64), numbers[f"bias{i}"].astype(np.int64), int(shift))
        for i, shift in enumerate(numbers["shifts"])
    ]


def network_inputs(cells: np.ndarray) -> np.ndarray:
    """(T * P, 54) int64: normalised cells, mean and deviation around."""
    values, means, deviations = normalised(cells)
    rows = [
        [*values[token].flatten(), *(means[token] - 128), *np.minimum(deviations[token], 127)]
        for token in np.ndindex(*cells.shape[:3])
    ]
    return np.array(rows)


def learned(cells: np.ndarray) -> np.ndarray:
    """(T, P, F) int64: a network in integers."""
    values = network_inputs(cells)
    for number, (weight, bias, shift) in enumerate(layers()):
        sums = values @ weight + bias
        values = np.floor_divide(sums, 2**shift)
        values = np.clip(values + (128 if number == len(layers()) - 1 else 0), 0, 255)
    return values.reshape(cells.shape[0], cells.shape[1] * cells.shape[2], -1)


DESCRIBE = {"contrast": contrast, "learned": learned}


def prices(highest: int) -> list[int]:
    """The whole numbers that have at most 7 bits before their zeros, up to the first above `highest`."""
    out = [0]
    while out[-1] <= highest:
        following = out[-1] + 1
        out.append(following + -following % 2 ** max(following.bit_length() - 7, 0))
    return out


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).sum())


def cheapest_units(looks: np.ndarray, price: int) -> list[int]:
    """The units that one place keeps, unit 0 among them, where each kept one costs `price`.

    Args:
        looks: (T, F), the place's descriptors.
    """
    kept = [0]
    for first in range(1, len(looks), BLOCK):
        end = min(first + BLOCK, len(looks))

        @cache
        def best(last: int, at: int, end: int = end) -> tuple[int, tuple[int, ...]]:
            """The lowest cost of units `at` to `end` after `last` was kept, and the units kept there."""
            ways = []
            held = 0
            for following in range(at, end):
                rest, units = best(following, following + 1, end)
                ways.append((held + price + rest, (following, *units)))
                held += distance(looks[following], looks[last])
            ways.append((held, ()))
            lowest = min(cost for cost, _ in ways)
            return [way for way in ways if way[0] == lowest][-1]  # that which keeps the next one latest

        kept += best(kept[-1], first)[1]
    return kept


def filled(units: int, per_unit: int, kept: set[int], far: dict[int, int], least: int, budget: int) -> np.ndarray:
    """`kept` with the minimum of every unit and then the budget filled up by the tokens farthest from their anchors."""
    kept = set(kept)
    ranked = sorted((i for i in range(units * per_unit) if i not in kept), key=lambda i: (-far[i], i))
    for t in range(1, units):
        here = [i for i in ranked if i // per_unit == t]
        lacking = min(least, per_unit) - (per_unit - len(here))
        kept.update(here[: max(lacking, 0)])
    ranked = [i for i in ranked if i not in kept]
    kept.update(ranked[: max(budget - len(kept), 0)])
    return np.array(sorted(kept))


def cost(units: int, per_unit: int, kept: set[int], least: int) -> int:
    counts = [sum(i // per_unit == t for i in kept) for t in range(units)]
    return counts[0] + sum(max(count, min(least, per_unit)) for count in counts[1:])


def hold(looks: np.ndarray, budget: int, least: int) -> np.ndarray:
    """What stays of (T, P, F) descriptors within a budget."""
    units, per_unit, width = looks.shape
    budget = min(units * per_unit, max(budget, per_unit + (units - 1) * min(least, per_unit)))

    def at(price: int) -> tuple[set[int], dict[int, int]]:
        kept, far = set(), {}
        for p in range(per_unit):
            mine = cheapest_units(looks[:, p], price)
            kept |= {t * per_unit + p for t in mine}
            for t in range(units):
                if t not in mine:
                    anchor = max(s for s in mine if s < t)
                    far[t * per_unit + p] = distance(looks[t, p], looks[anchor, p])
        return kept, far

    kept, far = at(0)
    if cost(units, per_unit, kept, least) > budget:
        offered = prices(255 * width * BLOCK)
        too_low, enough = 0, len(offered) - 1
        while enough - too_low > 1:
            middle = (too_low + enough) // 2
            if cost(units, per_unit, at(offered[middle])[0], least) > budget:
                too_low = middle
            else:
                enough = middle
        kept, far = at(offered[enough])
    return filled(units, per_unit, kept, far, least, budget)


def anchored(
    looks: np.ndarray, level: int, least: int, most: int | None, forced: frozenset[int] = frozenset()
) -> np.ndarray:
    """What of (T, P, F) descriptors differs by `level` from what was last kept at its place, or is `forced`."""
    units, per_unit, width = looks.shape

    def at(level: int) -> tuple[set[int], dict[int, int]]:
        kept, far = set(range(per_unit)), {}
        for p in range(per_unit):
            anchor = 0
            for t in range(1, units):
                moved = distance(looks[t, p], looks[anchor, p])
                if moved >= level or t * per_unit + p in forced:
                    kept.add(t * per_unit + p)
                    anchor = t
                else:
                    far[t * per_unit + p] = moved
        return kept, far

    top = 255 * width + 1
    level = min(level, top)
    kept, far = at(level)
    if most is None:
        return filled(units, per_unit, kept, far, least, 0)
    most = min(units * per_unit, max(most, per_unit + (units - 1) * min(least, per_unit)))
    if cost(units, per_unit, kept, least) <= most:
        return filled(units, per_unit, kept, far, least, 0)
    too_low, enough = level, top
    while enough - too_low > 1:
        middle = (too_low + enough) // 2
        if cost(units, per_unit, at(middle)[0], least) > most:
            too_low = middle
        else:
            enough = middle
    return filled(units, per_unit, *at(enough), least, most)


def share_of(units: int, per_unit: int, settings: Any) -> int:
    return math.floor(units * per_unit * (1 - Fraction(str(settings.rate or 0))))


def tokens_allowed(units: int, per_unit: int, settings: Any, saved: int | None = None) -> int:
    """How many tokens stay with a rate, or at most without one; `saved` is None for a clip that stands alone."""
    share = 1 - Fraction(str(settings.rate or 0))
    least = min(settings.min_tokens_per_unit, per_unit)
    most = settings.max_tokens or units * per_unit
    alone = max(share_of(units, per_unit, settings), per_unit + math.ceil((units - 1) * per_unit * share / 2))
    alone = max(min(alone, most), per_unit + (units - 1) * least)
    if saved is None:
        return alone
    return max(min(share_of(units, per_unit, settings) + saved, alone, most), 1, units * least)


def choose(looks: np.ndarray, settings: Any, saved: int | None = None) -> np.ndarray:
    """Which tokens of a clip stay.

    Args:
        looks: (T, P, F) descriptors; of a clip that goes on from another one, first what was there before.
        settings: With the fields of `tests.reference.hf.Settings`.
        saved: What the clips before saved, for a clip that goes on from another one.

    Returns:
        Sorted flat indices, not counting what was there before.
    """
    if settings.budget == "causal":
        return purse_of_looks(looks, settings, saved)
    units, per_unit, _ = looks.shape
    goes_on = saved is not None
    before = per_unit if goes_on else 0
    budget = before + tokens_allowed(units - goes_on, per_unit, settings, saved)
    least = settings.min_tokens_per_unit
    if settings.threshold:
        level = max(1, math.ceil(Fraction(str(settings.threshold)) * UNIT[settings.selection]))
        kept = anchored(looks, level, least, None if settings.max_tokens is None else budget)
    else:
        if goes_on:
            budget = min(budget, before + news(looks, settings))
        kept = hold(looks, budget, least)
    kept = kept[kept >= before] - before
    if len(kept):
        return kept
    kept = hold(looks, before + 1, 0)  # the one token that a prompt needs
    return kept[kept >= before] - before


def purse(
    allowances: list[int], per_unit: int, settings: Any, value: Any, shown: Any, noise: int, level: int, alone: bool
) -> np.ndarray:
    """What the causal budget keeps.

    Args:
        allowances: For each unit how many tokens the budget of the clip would keep if the clip ended with it.
        per_unit: Tokens of a unit.
        settings: As for `choose`.
        value: Of a unit and a place, how much the token is worth now.
        shown: Called with a unit and a place that later values are to be compared with.
        noise: What is worth less is not kept with a rate.
        level: What is worth as much is kept with a threshold.
        alone: Whether the clip goes on from no other one.
    """
    kept: list[int] = []
    had, earnings, worths = 0, [], []
    least = min(settings.min_tokens_per_unit, per_unit)
    for t, allowed in enumerate(allowances):
        earned = allowed - (allowances[t - 1] if t else 0)
        had += earned
        if t == 0 and alone:
            kept += range(per_unit)
            had -= per_unit
            continue
        had = min(had, 2 * per_unit)
        worth = [int(value(t, p)) for p in range(per_unit)]
        ranked = sorted(range(per_unit), key=lambda p: (-worth[p], p))
        if settings.threshold:
            good, purse = [p for p in ranked if worth[p] >= level], per_unit
        else:
            good, purse = [p for p in ranked if worth[p] >= noise and worth[p] > 0], had
            if worths:
                purse += per_unit if alone else 0
                before = sorted((w for each in worths[-8:] for w in each), reverse=True)
                number = max(sum(earnings[-8:]) + math.floor(Fraction(had, 2)), 1)
                good = [p for p in good if worth[p] >= before[min(number, len(before)) - 1]]
            worths.append(worth)
            earnings.append(earned)
        if settings.max_tokens is not None:
            purse = min(purse, settings.max_tokens - len(kept))
        good = good[: max(purse, 0)]
        for p in good:
            shown(t, p)
        needed = least if t else max(least, 1)
        others = [p for p in ranked if p not in good]
        good += others[: max(needed - len(good), 0)]
        kept += sorted(t * per_unit + p for p in good)
        had -= len(good)
    return np.array(kept)


def purse_of_looks(looks: np.ndarray, settings: Any, saved: int | None = None) -> np.ndarray:
    """The causal budget for descriptors; the arguments are those of `choose`."""
    goes_on = saved is not None
    anchors = [looks[0, p] for p in range(looks.shape[1])]
    looks = looks[1:] if goes_on else looks
    unit = UNIT[settings.selection]

    def show(t: int, p: int) -> None:
        anchors[p] = looks[t, p]

    units, per_unit, _ = looks.shape
    return purse(
        [tokens_allowed(t + 1, per_unit, settings, saved) for t in range(units)],
        per_unit,
        settings,
        lambda t, p: distance(looks[t, p], anchors[p]),
        show,
        max(1, math.ceil(Fraction(NOISE[settings.selection], 4) * unit)),
        max(1, math.ceil(Fraction(str(settings.threshold or 0)) * unit)),
        not goes_on,
    )


def purse_of_changes(pixels: np.ndarray, settings: Any) -> np.ndarray:
    """The causal budget for the paper's score, of (T, P, D) pixels; 10 grey levels are its noise."""
    units, per_unit, size = pixels.shape
    values = pixels.astype(np.int64)
    floors = [per_unit + t * min(settings.min_tokens_per_unit, per_unit) for t in range(units)]
    shares = [min(share_of(t + 1, per_unit, settings), settings.max_tokens or size * units) for t in range(units)]
    return purse(
        [max(pair) for pair in zip(shares, floors, strict=True)],
        per_unit,
        settings,
        lambda t, p: distance(values[t, p], values[t - 1, p]),
        lambda t, p: None,
        math.ceil(Fraction(10, 4) * size),
        math.ceil(Fraction(str(settings.threshold or 0)) * size),
        True,
    )


def refreshed_in_order(looks: np.ndarray, kept: set[int], level: int) -> np.ndarray:
    """(T*P,) bool, what a tower that reuses computes with the causal budget: `kept` and, of each unit, what differs.

    Args:
        looks: (T, P, F) descriptors.
        kept: Tokens that are computed anyway, all of unit 0 among them.
        level: The distance from what was computed last of a place that counts.
    """
    units, per_unit, _ = looks.shape
    last, computed, others, extra = list(looks[0]), set(kept), 0, 0
    for t in range(1, units):
        free = [p for p in range(per_unit) if t * per_unit + p not in kept]
        others += len(free)
        far = [p for p in free if distance(looks[t, p], last[p]) >= level]
        far.sort(key=lambda p: (-distance(looks[t, p], last[p]), p))
        chosen = far[: max(others // 2 - extra, 0)]
        extra += len(chosen)
        computed |= {t * per_unit + p for p in chosen}
        for p in range(per_unit):
            if t * per_unit + p in computed:
                last[p] = looks[t, p]
    return np.array([i in computed for i in range(units * per_unit)])


def news(looks: np.ndarray, settings: Any) -> int:
    """How many tokens of a clip that goes on differ from what was last shown of their place, if each such is shown."""
    level = math.ceil(Fraction(str(settings.threshold or NOISE[settings.selection])) * UNIT[settings.selection])
    count = 0
    for p in range(looks.shape[1]):
        shown = looks[0, p]
        for t in range(1, len(looks)):
            if distance(looks[t, p], shown) >= max(level, 1):
                shown, count = looks[t, p], count + 1
    return count


def stream(clips: Sequence[tuple[tuple[int, int], np.ndarray]], settings: Any) -> list[tuple[list[int], bool]]:
    """What stays of each clip of a stream, and whether it shows nothing new.

    Args:
        clips: Of each the rows and columns of tokens, and the (T, P, F) descriptors.
        settings: As for `choose`.
    """
    out: list[tuple[list[int], bool]] = []
    shown: list[np.ndarray] = []
    last_grid, saved = (0, 0), 0
    for grid, looks in clips:
        units, per_unit, _ = looks.shape
        if grid == last_grid:
            whole = np.concatenate([np.stack(shown)[None], looks])
            kept = choose(whole, settings, saved).tolist()
            out.append((kept, news(whole, settings) == 0))
        else:
            kept, saved = choose(looks, settings).tolist(), 0
            out.append((kept, False))
            shown, last_grid = [looks[0, p] for p in range(per_unit)], grid
        for index in kept:
            shown[index % per_unit] = looks[index // per_unit, index % per_unit]
        left = saved + share_of(units, per_unit, settings) - len(kept)
        saved = min(max(left, 0), per_unit) if settings.rate else 0
    return out


def select(cells: np.ndarray, settings: Any) -> np.ndarray:
    """`choose` for the pictures of a clip that stands alone."""
    return choose(DESCRIBE[settings.selection](cells), settings)
