# SPDX-License-Identifier: Apache-2.0
"""The independent reference of the selections `learned` and `contrast`, in plain loops and whole numbers.

Nothing here comes from `evs_vllm` or `evs_kernels`, and nothing is fast. It starts from frames
(`tests.reference.appearance`), so it knows nothing of the order of pixel rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from tests.reference.appearance import DESCRIBE, distance
from tests.reference.causal import purse

BLOCK = 32
"""Units of which a place's kept ones are chosen together."""

NOISE = {"contrast": 4, "learned": 20}
"""Thresholds: of a clip that goes on, what differs by less is no news."""

UNIT = {"contrast": Fraction(12 * 32, 100), "learned": Fraction(512, 100)}
"""The distance that a threshold of 1 means."""


def prices(highest: int) -> list[int]:
    """The whole numbers that have at most 7 bits before their zeros, up to the first above `highest`."""
    out = [0]
    while out[-1] <= highest:
        following = out[-1] + 1
        out.append(following + -following % 2 ** max(following.bit_length() - 7, 0))
    return out


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
