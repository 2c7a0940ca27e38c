# SPDX-License-Identifier: Apache-2.0
"""The causal budget (option ``budget``): what is kept of a unit does not depend on the units after it.

A clip that grows then keeps, up to where it ended before, the same tokens. With a rate it works as a purse, in whole
numbers and in the order of the units:

- **Allowance.** ``A(t)`` tokens are what `evs_vllm.core.budget.token_budget` allows of a clip that ends with unit t.
  The balance is what was allowed and not spent; each unit adds ``A(t) - A(t-1)``. Unit 0 is whole, which `token_budget`
  allows for: after it a unit adds half of its share, ``P * (1 - rate) / 2``, until unit 0 is paid, then all of it.
  (With the selection "paper" a unit adds nothing until then.)
- **Saving.** The balance is `SAVED_UNITS` whole units at most; what exceeds that is lost.
- **Debt.** A unit spends no more than the balance and `DEBT_UNITS` whole units, so that units 0 to t never have more
  than ``A(t) + DEBT_UNITS * P`` tokens. The first unit that is judged makes no debt, as nothing tells yet what is much;
  nor does a clip that goes on from others (`Clip.previous`), so that a stream never has more than its shares in sum.
- **Level.** A token is kept if its score reaches the level, the highest first, ties to the lower index, until that is
  spent. The level is found in the scores that the last `WINDOW` units had when they were judged: as many of them reach
  it as these units earned and half of the balance (rounded down; of a debt, too) together, but one at least. So a clip
  that goes on as it did spends what it earns and little by little what it saved, or pays what it owes; and a cut, which
  exceeds everything before it, is shown at once. Where there are no more scores than that, all reach it.
- **Noise.** Nothing is kept that differs by less than a quarter of the selection's `noise`: a still scene saves.
- **Minimum.** Where a unit keeps less than its minimum, its tokens of the highest scores fill it up, on credit if need
  be. They are not what later tokens are compared with, as with a threshold. Of a clip that goes on from others, unit 0
  keeps one token at least, because a prompt needs one.

``max_tokens`` ends it: a clip that has as many keeps its minima from then on. With a threshold, that is the level, and
``max_tokens`` is the only bound; without it the kept tokens are those of the budget of the clip.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

SAVED_UNITS = 2
"""Whole units that a clip can save up."""

DEBT_UNITS = 1
"""Whole units that a clip can owe."""

NOISE_PARTS = 4
"""One in so many of a selection's `noise` is the least that is kept."""

WINDOW = 8
"""Units, the latest ones, from whose scores the level comes."""

Scores = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Judge(Protocol):
    """Scores the units of a clip, one after the other."""

    def scores(self, unit: int) -> Scores:
        """(P,) how much each token of the unit is worth, given what was shown before."""

    def show(self, unit: int, stays: Mask) -> None:
        """Notes which tokens of the unit, (P,) bool, are what later ones are compared with."""


class FixedScores:
    """Scores that do not depend on what is kept.

    Args:
        scores: (T, P).
    """

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def scores(self, unit: int) -> Scores:
        return self._scores[unit]

    def show(self, unit: int, stays: Mask) -> None:
        pass


class Distances:
    """L1 distances from the last token that was shown of each place.

    Args:
        descriptors: (T, P, F) uint8.
        shown: (P, F) uint8, what stands for each place before unit 0; None if unit 0 is whole.
    """

    def __init__(self, descriptors: npt.NDArray[np.uint8], shown: npt.NDArray[np.uint8] | None = None) -> None:
        self._values = descriptors.astype(np.int16)
        self._shown = self._values[0].copy() if shown is None else shown.astype(np.int16)

    def scores(self, unit: int) -> Scores:
        return np.abs(self._values[unit] - self._shown).sum(axis=1, dtype=np.int64)

    def show(self, unit: int, stays: Mask) -> None:
        self._shown[stays] = self._values[unit][stays]


def highest(scores: Scores, among: Mask, count: int) -> Mask:
    """(P,) bool, the `count` highest scores among some tokens, or all of those; ties go to the lower index."""
    found = np.zeros(len(scores), dtype=np.bool_)
    order = np.argsort(-scores, kind="stable")
    found[order[among[order]][: max(count, 0)]] = True
    return found


def spend(
    judge: Judge,
    places: int,
    allowed: Sequence[int],
    *,
    whole_first: bool,
    noise: float = 0,
    level: float | None = None,
    most: int | None = None,
    least: int = 0,
    weights: Sequence[int] | None = None,
) -> npt.NDArray[np.int64]:
    """Chooses tokens unit after unit, as the module says.

    Args:
        judge: Scores the tokens; higher is better.
        places: P.
        allowed: (T,) the allowance after each unit, which never falls.
        whole_first: Whether unit 0 is kept whole. Else it is judged, keeps one token at least, and there is no debt.
        noise: The score that a token has to reach, before it is weighted; not with `level`.
        level: The score that keeps a token, of a threshold; `allowed` says nothing then but how many units there are.
        most: ``max_tokens``.
        least: The minimum of every unit.
        weights: (T,) how often the scores of a unit count; None for once.

    Returns:
        (K,) int64, the sorted flat indices of what is kept.
    """
    kept = np.zeros((len(allowed), places), dtype=np.bool_)
    past: deque[tuple[int, Scores]] = deque(maxlen=WINDOW)
    everything, before, balance, left = np.ones(places, dtype=np.bool_), 0, 0, most
    for unit, total in enumerate(allowed):
        earned, before = total - before, total
        balance += earned
        if unit == 0 and whole_first:
            kept[0] = True
        else:
            balance = min(balance, SAVED_UNITS * places)
            scores = plain = judge.scores(unit)
            if weights is not None:
                scores = plain * weights[unit]
            if level is not None:
                worth, limit = scores >= level, places
            else:
                worth, limit = (plain >= noise) & (scores > 0), balance
                if past:
                    limit += DEBT_UNITS * places * whole_first
                    worth &= scores >= _level(past, balance)
                past.append((earned, scores))
            stays = highest(scores, worth, limit if left is None else min(limit, left))
            judge.show(unit, stays)
            lacking = min(max(least, int(unit == 0)), places) - int(stays.sum())
            kept[unit] = stays | highest(scores, everything & ~stays, lacking)
        balance -= int(kept[unit].sum())
        left = None if left is None else left - int(kept[unit].sum())
    return np.flatnonzero(kept)


def _level(past: Sequence[tuple[int, Scores]], balance: int) -> Any:
    """The score that as many tokens of the last units reach as these earned and half of the balance together."""
    scores = np.concatenate([each for _, each in past])
    reach = min(max(sum(earned for earned, _ in past) + balance // 2, 1), len(scores))
    return np.partition(scores, len(scores) - reach)[len(scores) - reach]


def refresh(descriptors: npt.NDArray[np.uint8], forced: Mask, level: int, share: int) -> npt.NDArray[np.int64]:
    """Tokens that a tower which reuses computes beside those that are kept, unit after unit.

    Args:
        descriptors: (T, P, F) uint8.
        forced: (T, P) bool, what is computed anyway; unit 0 whole.
        level: The distance from what was last computed of its place from which a token is computed.
        share: After every unit, at most one in so many of the tokens so far that are not forced is computed. Of a
            unit's those that differ most.

    Returns:
        Their sorted flat indices.
    """
    judge, computed, free = Distances(descriptors), np.zeros(forced.shape, dtype=np.bool_), 0
    for unit in range(1, len(forced)):
        others = ~forced[unit]
        free += int(others.sum())
        scores = judge.scores(unit)
        left = free // share - int(computed.sum())
        computed[unit] = highest(scores, others & (scores >= level), left)
        judge.show(unit, forced[unit] | computed[unit])
    return np.flatnonzero(computed)
