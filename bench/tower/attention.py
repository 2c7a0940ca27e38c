# SPDX-License-Identifier: Apache-2.0
"""Other ways to write the attention of K/V reuse (`evs_vllm.core.schedule`), for `tower.py` to time against the one
in use.

Each takes a schedule, (rows, heads, head size) queries, keys and values and the scale, as `ReuseSchedule.attend` does.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from evs_vllm.core.reuse import ClipRows
from evs_vllm.core.schedule import ReuseSchedule


def sequences(schedule: ReuseSchedule) -> list[tuple[np.ndarray, np.ndarray]]:
    """(query rows, key rows) of every sequence of a schedule, in patches."""
    m, start, found = schedule.patches, 0, []
    for clip in schedule.clips:
        for unit, rows, slots in clip.sequences():
            keys = start + clip.sources[unit, slots]
            queries = np.arange(start + rows.start, start + rows.stop)
            found.append(tuple((x[:, None] * m + np.arange(m)).reshape(-1) for x in (queries, keys)))
        start += len(clip.slots)
    return found


def once(schedule: ReuseSchedule, name: str, make: Callable[[], Any]) -> Any:
    """Schedules serve many layers; what a variant needs is made by the first."""
    if not hasattr(schedule, name):
        setattr(schedule, name, make())
    return getattr(schedule, name)


def one_by_one(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
    """The plainest: gather every sequence's keys and attend. What the others are checked against."""
    out = torch.empty_like(query)
    for queries, keys in sequences(schedule):
        q, k = torch.from_numpy(queries), torch.from_numpy(keys)
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (query[q], key[k], value[k]))
        out[q] = scaled_dot_product_attention(q_, k_, v_, scale=scale)[0].transpose(0, 1)
    return out


def gathered(
    schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float, buckets: tuple[int, ...] = ()
) -> torch.Tensor:
    """All sequences of one key length at once: keys gathered, queries padded to the longest of their bucket."""

    def groups() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        by_size = defaultdict(list)
        for queries, keys in sequences(schedule):
            bucket = next((b for b in buckets if len(queries) <= b), 1 << 30)
            by_size[len(keys), bucket].append((queries, keys))
        made = []
        for members in by_size.values():
            longest = max(len(q) for q, _ in members)
            padded = np.stack([np.pad(q, (0, longest - len(q)), mode="edge") for q, _ in members])
            real = np.stack([np.arange(longest) < len(q) for q, _ in members])
            made.append((padded, np.stack([k for _, k in members]), real))
        return [tuple(torch.from_numpy(x) for x in group) for group in made]

    out = torch.empty_like(query)
    for queries, keys, real in once(schedule, f"_groups{buckets}", groups):
        q, k, v = (x.transpose(1, 2) for x in (query[queries], key[keys], value[keys]))
        attended = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        out[queries[real]] = attended[real]
    return out


def row_state(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
    """A running state kept as rows of (heads, head size), so that new keys are copied whole."""
    out, start, m = torch.empty_like(query), 0, schedule.patches
    for clip in schedule.clips:
        state = key.new_empty(2, clip.tokens_per_unit * m, *key.shape[1:])
        rows_at = start + clip.units * m
        filled = -1
        slot = torch.from_numpy(clip.slots[:, None] * m + np.arange(m)).reshape(-1)
        for unit, rows, slots in clip.sequences():
            if unit != filled:
                first, last = int(rows_at[unit]), int(rows_at[unit + 1])
                where = slot[first - start : last - start]
                state[0].index_copy_(0, where, key[first:last])
                state[1].index_copy_(0, where, value[first:last])
                filled = unit
            r = slice(start + rows.start * m, start + rows.stop * m)
            p = slice(slots.start * m, slots.stop * m)
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in (query[r], state[0, p], state[1, p]))
            out[r] = scaled_dot_product_attention(q_, k_, v_, scale=scale)[0].transpose(0, 1)
        start += len(clip.slots) * m
    return out


def unit_windows(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
    """A running state of rows; the windows of one size of a unit in one call, queries padded."""

    def steps(clip: ClipRows, m: int) -> list[Any]:
        by_unit: dict[int, dict[int, list[tuple[np.ndarray, np.ndarray]]]] = defaultdict(lambda: defaultdict(list))
        for unit, rows, slots in clip.sequences():
            q, p = (np.arange(s.start * m, s.stop * m) for s in (rows, slots))
            by_unit[unit][len(p)].append((q, p))
        made = []
        for unit, sizes in by_unit.items():
            calls = []
            for members in sizes.values():
                longest = max(len(q) for q, _ in members)
                padded = np.stack([np.pad(q, (0, longest - len(q)), mode="edge") for q, _ in members])
                real = np.stack([np.arange(longest) < len(q) for q, _ in members])
                calls.append(tuple(map(torch.from_numpy, (padded, np.stack([p for _, p in members]), real))))
            made.append((unit, calls))
        return made

    out, start, m = torch.empty_like(query), 0, schedule.patches
    plans = once(schedule, "_steps", lambda: [steps(clip, m) for clip in schedule.clips])
    for clip, plan in zip(schedule.clips, plans, strict=True):
        q, k, v = (x[start : start + len(clip.slots) * m] for x in (query, key, value))
        o = out[start : start + len(clip.slots) * m]
        state = key.new_empty(2, clip.tokens_per_unit * m, *key.shape[1:])
        slot = torch.from_numpy(clip.slots[:, None] * m + np.arange(m)).reshape(-1)
        for unit, calls in plan:
            new = slice(int(clip.units[unit]) * m, int(clip.units[unit + 1]) * m)
            state[0].index_copy_(0, slot[new], k[new])
            state[1].index_copy_(0, slot[new], v[new])
            for queries, slots, real in calls:
                q_, k_, v_ = (x.transpose(1, 2) for x in (q[queries], state[0][slots], state[1][slots]))
                attended = scaled_dot_product_attention(q_, k_, v_, scale=scale).transpose(1, 2)
                o[queries[real]] = attended[real]
        start += len(clip.slots) * m
    return out


def mixed(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
    """Windows gathered and batched; whole units over a running state of rows."""
    windowed = any(len(clip.windows) > 2 for clip in schedule.clips)
    return (bucketed if windowed else row_state)(schedule, query, key, value, scale)


bucketed = partial(gathered, buckets=(4, 8, 16, 32, 64))

VARIANTS: dict[str, Callable[..., torch.Tensor]] = {
    "gather every sequence": one_by_one,
    "row state": row_state,
    "windows of a unit batched": unit_windows,
    "gather all, padded": gathered,
    "gather all, padded in buckets": lambda *a, **k: bucketed(*a, **k),
    "windows gathered, units by state": mixed,
}
