# SPDX-License-Identifier: Apache-2.0
"""K/V reuse in the vision tower: compute some patches of a clip, let the others lend their last keys and values.

The rule, layer by layer: queries, keys, values, attention output and MLP are computed for the computed tokens only; in
unit t the keys and values of slot p are those of the latest computed (t', p) with t' <= t, which exists because unit 0
is whole. A slot is a token's index within its unit. Attention stays within a unit (or a window of it), so a unit or
window without computed tokens costs nothing. Rotary phases depend on the slot alone, so rotated keys are reused as they
are.

Everything here is independent of vLLM and of the family: a family's tower calls it with (rows, heads, head size)
queries, keys and values. `scheduled` hands a `ReuseSchedule` to each of the tower's attention modules.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from evs_vllm.core.plan import IntArray, RetentionPlan

SCHEDULE = "evs_schedule"
"""Attribute of an attention module that holds the schedule of its layer while a tower runs on computed patches."""


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
    def sources(self) -> IntArray:
        """(U, P) the row whose keys and values serve each slot in each unit that has rows."""
        own = np.full((len(self.units) - 1, self.tokens_per_unit), -1, dtype=np.int64)
        own[self.unit_of_row, self.slots] = np.arange(len(self.slots))
        return np.maximum.accumulate(own, axis=0)  # later units have larger rows

    def lengths(self) -> tuple[IntArray, IntArray, IntArray]:
        """What `sequences` tells one by one, at once.

        Returns:
            The number of rows and of slots of each window that has rows, and, one window after the other, the row that
            serves each of its slots.
        """
        window = np.searchsorted(self.windows, self.slots, side="right") - 1
        sequence = self.unit_of_row * (len(self.windows) - 1) + window
        found, queries = np.unique(sequence, return_counts=True)
        unit, window = np.divmod(found, len(self.windows) - 1)
        keys = np.diff(self.windows)[window]
        first = unit * self.tokens_per_unit + self.windows[window]
        within = np.arange(keys.sum()) - np.repeat(np.cumsum(keys) - keys, keys)
        return queries, keys, self.sources.reshape(-1)[np.repeat(first, keys) + within]

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
    unit, slot = np.divmod(plan.computed, plan.tokens_per_unit)
    row_order = np.lexsort((rank[slot], unit))
    counts = np.bincount(unit, minlength=units)
    return ClipRows(rank[slot][row_order], np.concatenate([[0], np.cumsum(counts[counts > 0])]), starts), row_order


class Varlen(NamedTuple):
    """A schedule in the form that variable-length attention kernels take.

    Attributes:
        key_rows: (sum of key lengths,) int64, for each key of each sequence the row that lends it.
        query_starts: (sequences + 1,) int32, cumulative query lengths; queries are all rows in order.
        key_starts: (sequences + 1,) int32, cumulative key lengths.
        longest_query: Largest number of queries of a sequence.
        longest_key: Largest number of keys of a sequence.
    """

    key_rows: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


class ReuseSchedule:
    """Who attends to what, for a batch of clips in one kind of layer (whole units, or windows).

    Args:
        clips: The clips in the order of their rows.
        patches: Patches per token (4 for 2x2 merging); each token is that many consecutive rows of the tower.
    """

    def __init__(self, clips: Sequence[ClipRows], patches: int) -> None:
        self.clips = clips
        self.patches = patches
        self._varlen: Varlen | None = None

    def varlen(self, device: torch.device) -> Varlen:
        """The schedule for one variable-length kernel over gathered keys; built once, used by every layer."""
        if self._varlen is None:
            m = self.patches
            parts = [clip.lengths() for clip in self.clips]
            queries, keys = (np.concatenate([part[i] for part in parts]) * m for i in (0, 1))
            starts = np.cumsum([0, *(len(clip.slots) for clip in self.clips)])
            tokens = [start + part[2] for start, part in zip(starts, parts)]
            key_rows = (np.concatenate(tokens)[:, None] * m + np.arange(m)).reshape(-1)
            query_starts, key_starts = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (queries, keys))
            self._varlen = Varlen(
                torch.from_numpy(key_rows).to(device),
                torch.from_numpy(query_starts).to(device),
                torch.from_numpy(key_starts).to(device),
                int(queries.max()),
                int(keys.max()),
            )
        return self._varlen

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of the computed patches.

        Args:
            query, key, value: (R, heads, head size), the computed patches of all clips, keys rotated.
            scale: Factor on the scores.

        Returns:
            (R, heads, head size).
        """
        out = torch.empty_like(query)
        start = 0
        for clip in self.clips:
            rows = slice(start, start + len(clip.slots) * self.patches)
            self._attend_clip(clip, query[rows], key[rows], value[rows], out[rows], scale)
            start = rows.stop
        return out

    def _attend_clip(
        self,
        clip: ClipRows,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float,
    ) -> None:
        # One unit after the other over a running state: only new keys and values are written, none are copied per unit.
        m = self.patches
        heads, size = query.shape[1:]
        state = key.new_empty(2, heads, clip.tokens_per_unit * m, size)
        patch_slots = torch.from_numpy(clip.slots[:, None] * m + np.arange(m)).reshape(-1).to(key.device)
        filled = -1
        for unit, rows, slots in clip.sequences():
            if unit != filled:
                new = slice(int(clip.units[unit]) * m, int(clip.units[unit + 1]) * m)
                state[0].index_copy_(1, patch_slots[new], key[new].transpose(0, 1))
                state[1].index_copy_(1, patch_slots[new], value[new].transpose(0, 1))
                filled = unit
            r, p = slice(rows.start * m, rows.stop * m), slice(slots.start * m, slots.stop * m)
            attended = scaled_dot_product_attention(
                query[r].transpose(0, 1)[None], state[0][None, :, p], state[1][None, :, p], scale=scale
            )
            out[r] = attended[0].transpose(0, 1)


@contextmanager
def scheduled(attentions: Iterable[Any], schedules: Iterable[ReuseSchedule]) -> Iterator[None]:
    """Hands each attention module the schedule of its layer, for as long as the block runs.

    Args:
        attentions: The tower's attention modules, one for each layer.
        schedules: The schedule of each layer.
    """
    modules = list(attentions)
    try:
        for module, schedule in zip(modules, schedules, strict=True):
            setattr(module, SCHEDULE, schedule)
        yield
    finally:
        for module in modules:
            vars(module).pop(SCHEDULE, None)
