# SPDX-License-Identifier: Apache-2.0
"""K/V reuse in the vision tower: compute some patches of a clip, let the others lend their last keys and values.

The rule, layer by layer: queries, keys, values, attention output and MLP are computed for the computed tokens only; in
unit t the keys and values of slot p are those of the latest computed (t', p) with t' <= t, which exists because unit 0
is whole. A slot is a token's index within its unit. Attention stays within a unit (or a window of it), so a unit or
window without computed tokens costs nothing. Rotary phases depend on the slot alone, so rotated keys are reused as they
are.

Everything here is independent of vLLM and of the family: a family's tower calls it with (rows, heads, head size)
queries, keys and values. `place` puts what its schedules need on the device, before the first layer; `scheduled` hands
a `ReuseSchedule` to each of the tower's attention modules.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from evs_vllm.core.plan import IntArray, RetentionPlan
from evs_vllm.core.rows import upload

SCHEDULE = "evs_schedule"
"""Attribute of an attention module that holds the schedule of its layer while a tower runs on computed patches."""

Form = Literal["loop", "padded", "varlen"]
"""How the attention of a schedule is computed. "loop": window after window over a running state, the plain way and the
fastest on a CPU; "padded": few calls over batches of windows (`Padded`), for any other device; "varlen": one call of a
kernel that the caller has (`Varlen`)."""

LEAST_PADDING = 64
"""Queries of a sequence, in patches, up to which padding costs a GPU nothing: its kernels compute in such tiles."""


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
        slots = self.tokens_per_unit
        latest = np.full((len(self.units) - 1, slots), -1, dtype=np.int64)
        latest.reshape(-1)[self.unit_of_row * slots + self.slots] = np.arange(len(self.slots))
        for before, now in zip(latest, latest[1:]):
            np.maximum(before, now, out=now)  # later units have larger rows
        return latest

    def whole_units(self) -> "ClipRows":
        """The same rows without windows: a unit's tokens attend to all of it."""
        whole = replace(self, windows=self.windows[[0, -1]])
        # What windows have no part in is not made twice.
        vars(whole).update(unit_of_row=self.unit_of_row, sources=self.sources)
        return whole

    def lengths(self) -> tuple[IntArray, IntArray, IntArray]:
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
    unit, slot = np.divmod(plan.computed, plan.tokens_per_unit)
    # Sorted by where they would stand if all were computed; to mark places is faster than to sort.
    index_at = np.full(plan.num_tokens, -1, dtype=np.int64)
    index_at[unit * plan.tokens_per_unit + rank[slot]] = np.arange(len(slot))
    row_order = index_at[index_at >= 0]
    counts = np.bincount(unit, minlength=units)
    return ClipRows(rank[slot][row_order], np.concatenate([[0], np.cumsum(counts[counts > 0])]), starts), row_order


class Varlen(NamedTuple):
    """A schedule in the form that variable-length attention kernels take.

    Attributes:
        key_tokens: (sum of the sequences' slots,) int32, for each of them the token that lends keys and values; a token
            is `ReuseSchedule.patches` consecutive rows.
        query_starts: (sequences + 1,) int32, cumulative query lengths in rows; queries are all rows in order.
        key_starts: (sequences + 1,) int32, cumulative key lengths in rows.
        longest_query: Largest number of queries of a sequence, in rows.
        longest_key: Largest number of keys of a sequence, in rows.
    """

    key_tokens: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


class Padded(NamedTuple):
    """A schedule as few batches of equal shape: sequences of as many keys and about as many queries.

    Attributes:
        batches: For each, (sequences, longest) int32, the tokens whose queries it computes, where shorter sequences
            repeat their last one; and (sequences, slots) int32, the tokens that lend keys and values.
        places: (C,) int32, for each token where it stands among the queries of all batches.
    """

    batches: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    places: torch.Tensor


class ReuseSchedule:
    """Who attends to what, for a batch of clips in one kind of layer (whole units, or windows).

    Args:
        clips: The clips in the order of their rows.
        patches: Patches per token (4 for 2x2 merging); each token is that many consecutive rows of the tower.

    Attributes:
        placed: What `place` put on the device; None for the form "loop", which needs nothing.
    """

    def __init__(self, clips: Sequence[ClipRows], patches: int) -> None:
        self.clips = clips
        self.patches = patches
        self.placed: Varlen | Padded | None = None

    @cached_property
    def lengths(self) -> tuple[IntArray, IntArray, IntArray]:
        """`ClipRows.lengths` of all clips, one after the other, as tokens of the batch."""
        queries, keys, rows = zip(*(clip.lengths() for clip in self.clips))
        starts = np.cumsum([0, *(len(clip.slots) for clip in self.clips)])
        return (
            np.concatenate(queries),
            np.concatenate(keys),
            np.concatenate([own + start if start else own for start, own in zip(starts, rows)]),
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of the computed patches, in the form that was placed; "varlen" is for who has such a kernel.

        Args:
            query, key, value: (R, heads, head size), the computed patches of all clips, keys rotated.
            scale: Factor on the scores.

        Returns:
            (R, heads, head size).
        """
        if isinstance(self.placed, Padded):
            return self._attend_padded(self.placed, query, key, value, scale)
        out = torch.empty_like(query)
        start = 0
        for clip in self.clips:
            rows = slice(start, start + len(clip.slots) * self.patches)
            self._attend_clip(clip, query[rows], key[rows], value[rows], out[rows], scale)
            start = rows.stop
        return out

    def take(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of some tokens.

        Args:
            rows: (R, ...), one for each patch.
            tokens: (..., n) int32, on the same device.

        Returns:
            (..., n * `patches`, ...).
        """
        return rows.unflatten(0, (-1, self.patches))[tokens].flatten(tokens.ndim - 1, tokens.ndim)

    def _attend_padded(
        self, form: Padded, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        attended = []
        for queries, keys in form.batches:
            q = self.take(query, queries).transpose(1, 2)
            k, v = (self.take(x, keys).transpose(1, 2) for x in (key, value))
            attended.append(scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
        return self.take(torch.cat(attended), form.places)

    def varlen_arrays(self) -> list[IntArray]:
        """The arrays of `Varlen`."""
        queries, keys, tokens = self.lengths
        return [tokens, *(np.concatenate([[0], np.cumsum(lengths * self.patches)]) for lengths in (queries, keys))]

    def padded_arrays(self) -> list[IntArray]:
        """The arrays of `Padded`: those of each batch, then the places."""
        queries, keys, tokens = self.lengths
        first_query, first_key = (np.cumsum(lengths) - lengths for lengths in (queries, keys))
        # A batch is padded to at most twice its queries, or to what costs nothing.
        doublings = np.ceil(np.log2(np.maximum(queries * self.patches / LEAST_PADDING, 1))).astype(np.int64)
        kind = keys * 64 + doublings
        arrays: list[IntArray] = []
        first_place = np.empty_like(queries)
        filled = 0
        for this in np.flatnonzero(np.bincount(kind)):
            members = np.flatnonzero(kind == this)
            lengths, slots = queries[members], np.arange(this // 64)
            longest = int(lengths.max())
            # Padding repeats the last query.
            columns = np.minimum(np.arange(longest), lengths[:, None] - 1)
            arrays += [first_query[members, None] + columns, tokens[first_key[members, None] + slots]]
            first_place[members] = filled + np.arange(len(members)) * longest
            filled += len(members) * longest
        places = np.repeat(first_place - first_query, queries) + np.arange(int(queries.sum()))
        return [*arrays, places]

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


def form_on(device: torch.device, has_varlen: bool = False) -> Form:
    """The fastest form on a device, where the caller may have a kernel for variable lengths off the CPU."""
    if device.type == "cpu":
        return "loop"
    return "varlen" if has_varlen else "padded"


def place(
    schedules: Sequence[ReuseSchedule], form: Form, device: torch.device, arrays: Sequence[IntArray] = ()
) -> list[torch.Tensor]:
    """Puts on the device what schedules need there, in one copy together with index arrays of the caller.

    Called before the first layer: a copy between layers would have the host wait for all that is queued before it.

    Args:
        schedules: The schedules of a tower; each is `placed` afterwards.
        form: How their attention is to be computed.
        device: Where the tower is.
        arrays: Further index arrays, of values below 2**31.

    Returns:
        `arrays` as int32 tensors on the device.
    """
    if form == "loop":
        return upload(arrays, device)
    own = [schedule.varlen_arrays() if form == "varlen" else schedule.padded_arrays() for schedule in schedules]
    tensors = iter(upload([*arrays, *chain(*own)], device))
    callers = [next(tensors) for _ in arrays]
    for schedule, parts in zip(schedules, own):
        placed = [next(tensors) for _ in parts]
        if form == "varlen":
            queries, keys, _ = schedule.lengths
            longest = [int(lengths.max()) * schedule.patches for lengths in (queries, keys)]
            schedule.placed = Varlen(placed[0], placed[1], placed[2], longest[0], longest[1])
        else:
            *batches, places = placed
            schedule.placed = Padded(tuple(zip(batches[::2], batches[1::2])), places)
    return callers


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
