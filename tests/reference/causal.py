# SPDX-License-Identifier: Apache-2.0
"""The independent reference of the causal budget, and of what a tower computes with it, in plain loops."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from tests.reference.appearance import distance


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
