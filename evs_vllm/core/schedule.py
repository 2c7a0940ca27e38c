# SPDX-License-Identifier: Apache-2.0
"""The attention of a tower that computes some tokens and reuses keys and values (`evs_vllm.core.reuse`).

A `ReuseSchedule` says who attends to what in one kind of layer, in one of three forms. `place` puts what the schedules
of a tower need on the device, before the first layer; `scheduled` hands each to its attention modules.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from evs_vllm.core.plan import IntArray
from evs_vllm.core.reuse import ClipRows
from evs_vllm.core.rows import upload

SCHEDULE = "evs_schedule"
"""Attribute of an attention module that holds the schedule of its layer while a tower runs on computed patches."""

Form = Literal["loop", "padded", "varlen"]
"""How the attention of a schedule is computed. "loop": window after window over a running state, the plain way and the
fastest on a CPU; "padded": few calls over batches of windows (`Padded`), for any other device; "varlen": one call of a
kernel that the caller has (`Varlen`)."""

LEAST_PADDING = 64
"""Queries of a sequence, in patches, up to which padding costs a GPU nothing: its kernels compute in such tiles."""


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
