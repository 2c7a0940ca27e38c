# SPDX-License-Identifier: Apache-2.0
"""K/V reuse in the vision tower: compute some patches of a clip, let the others lend their last keys and values.

The rule, layer by layer: queries, keys, values, attention output and MLP are computed for the computed tokens only; in
unit t the keys and values of slot p are those of the latest computed (t', p) with t' <= t, which exists because unit 0
is whole. A slot is a token's index within its unit. Attention stays within a unit (or a window of it), so a unit or
window without computed tokens costs nothing. Rotary phases depend on the slot alone, so rotated keys are reused as they
are.

Here is which rows a tower holds and which of them serve whom; `evs_vllm.core.schedule` is the attention over them. Both
are independent of vLLM and of the family: a family's tower calls them with (rows, heads, head size) queries, keys and
values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evs_vllm.core.plan import IntArray, RetentionPlan


def window_order(height: int, width: int, window: int | None) -> tuple[IntArray, IntArray]:
    """The slots of a unit, window by window.

    Args:
        height, width: The unit's grid in tokens.
        window: Side of a square window in tokens; windows at the right and lower edge may be smaller. None: no windows.

    Returns:
        order: (P,) the slots ``row*width + column`` sorted by window, then by slot.
        starts: (number of windows + 1,) where each window begins in `order`.
    """
    row, column = np.divmod(np.arange(height * width), width)
    side = window or max(height, width)
    index = (row // side) * -(-width // side) + column // side
    order = np.argsort(index, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(index))])


@dataclass(frozen=True)
class ClipRows:
    """The computed tokens of one clip in the order in which the tower holds them: by unit, then by window.

    Attributes:
        slots: (C,) for each row its slot, counted in window order.
        units: (U+1,) row boundaries of the units that have rows.
        windows: (number of windows + 1,) slot boundaries of the windows; (0, P) without windows.
    """

    slots: IntArray
    units: IntArray
    windows: IntArray

    @property
    def tokens_per_unit(self) -> int:
        return int(self.windows[-1])

    @cached_property
    def unit_of_row(self) -> IntArray:
        """(C,) which of the units that have rows each row is in."""
        return np.repeat(np.arange(len(self.units) - 1), np.diff(self.units))

    @cached_property
    def sources(self) -> npt.NDArray[np.int32]:
        """(U, P) int32, the row whose keys and values serve each slot in each unit that has rows."""
        slots = self.tokens_per_unit
        latest = np.full((len(self.units) - 1, slots), -1, dtype=np.int32)
        latest.reshape(-1)[self.unit_of_row * slots + self.slots] = np.arange(len(self.slots), dtype=np.int32)
        for before, now in zip(latest, latest[1:]):
            np.maximum(before, now, out=now)  # later units have larger rows
        return latest

    def whole_units(self) -> "ClipRows":
        """The same rows without windows: a unit's tokens attend to all of it."""
        whole = replace(self, windows=self.windows[[0, -1]])
        # What windows have no part in is not made twice.
        vars(whole).update(unit_of_row=self.unit_of_row, sources=self.sources)
        return whole

    def lengths(self) -> tuple[IntArray, IntArray, npt.NDArray[np.int32]]:
        """What `sequences` tells one by one, at once.

        Returns:
            The number of rows and of slots of each window that has rows, and, one window after the other, the row that
            serves each of its slots.
        """
        sizes = np.diff(self.windows)
        window_of_slot = np.repeat(np.arange(len(sizes)), sizes)
        window_of_row = self.unit_of_row * len(sizes) + window_of_slot[self.slots]
        # Rows are sorted by unit and window.
        bounds = np.flatnonzero(window_of_row[1:] != window_of_row[:-1]) + 1
        bounds = np.concatenate([[0], bounds, [len(self.slots)]])
        found, queries = window_of_row[bounds[:-1]], np.diff(bounds)
        units = len(self.units) - 1
        if len(found) == units * len(sizes):
            return queries, np.tile(sizes, units), self.sources.reshape(-1)
        has_rows = np.zeros((units, len(sizes)), dtype=np.bool_)
        has_rows.reshape(-1)[found] = True
        return queries, sizes[found % len(sizes)], self.sources[has_rows[:, window_of_slot]]

    def sequences(self) -> Iterator[tuple[int, slice, slice]]:
        """(unit, its rows in a window, the window's slots) of each window that has rows."""
        for unit, (start, stop) in enumerate(zip(self.units, self.units[1:], strict=False)):
            cuts = start + np.searchsorted(self.slots[start:stop], self.windows)
            for window, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
                if first < last:
                    yield (
                        unit,
                        slice(int(first), int(last)),
                        slice(*(int(x) for x in self.windows[window : window + 2])),
                    )


def clip_rows(plan: RetentionPlan, window: int | None) -> tuple[ClipRows, IntArray]:
    """Orders the computed tokens of a clip for the tower.

    Returns:
        The rows, and (C,) for each row its index in ``plan.computed``.
    """
    units, height, width = plan.grid
    order, starts = window_order(height, width, window)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # numpy's quotients are several times faster than its remainders.
    unit = plan.computed // plan.tokens_per_unit
    first = unit * plan.tokens_per_unit
    ranks = rank[plan.computed - first]
    # Sorted by where they would stand if all were computed; to mark places is faster than to sort.
    index_at = np.full(plan.num_tokens, -1, dtype=np.int32)
    index_at[first + ranks] = np.arange(len(ranks), dtype=np.int32)
    row_order = index_at[index_at >= 0].astype(np.int64)
    # `computed` is sorted, so the units' bounds are found without looking at every token.
    bounds = np.searchsorted(plan.computed, np.arange(units + 1) * plan.tokens_per_unit)
    boundaries = np.concatenate([[0], bounds[1:][np.diff(bounds) > 0]])
    return ClipRows(ranks[row_order], boundaries, starts), row_order
