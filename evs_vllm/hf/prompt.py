# SPDX-License-Identifier: Apache-2.0
"""A batch of prompts as transformers' processors make it, and the same batch without the dropped video tokens.

Position IDs are those that vLLM and the original implementation of the models give: after a clip or an image, text
resumes at the largest ID so far (over t, h and w) plus one. transformers 5 resumes at max(h, w) instead, which numbers
the text after a long clip differently from how the model was trained and is served.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from evs_vllm.core.plan import IntArray, Layout, RetentionPlan
from evs_vllm.core.positions import PositionRequest, pruned_positions
from evs_vllm.core.prompt import ClipSpan
from evs_vllm.errors import PlanError, RequestError


class MediaItem(NamedTuple):
    """An image or a clip.

    Attributes:
        grid: (T, H, W) in tokens.
        time_step: Position IDs from one temporal unit to the next.
        units_apart: Whether text stands between the temporal units (Qwen3-VL); each is then laid out as a picture.
        position_span: Position IDs that a clip takes up.
    """

    grid: tuple[int, int, int]
    time_step: float = 1.0
    units_apart: bool = False
    position_span: int = 0

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class PlacedItem(NamedTuple):
    """A media item and the prompt index of its first token."""

    offset: int
    medium: MediaItem

    def runs(self, token_ids: Sequence[int]) -> "Iterator[PlacedItem]":
        """Itself, or its units where they stand apart."""
        if not self.medium.units_apart:
            yield self
            return
        units, height, width = self.medium.grid
        placeholder, index = token_ids[self.offset], self.offset
        for _ in range(units):
            while token_ids[index] != placeholder:
                index += 1
            yield PlacedItem(index, MediaItem((1, height, width)))
            index += height * width


def lay_out(token_ids: Sequence[int], items: Sequence[PlacedItem]) -> tuple[torch.Tensor, int]:
    """M-RoPE position IDs of an unpruned prompt.

    Args:
        token_ids: L ids.
        items: Its images and clips, by offset.

    Returns:
        (3, L) int64, and the delta that, added to a later index of the sequence, gives its ID.
    """
    ids = np.empty((3, len(token_ids)), dtype=np.int64)
    read, following = 0, 0
    for offset, medium in (run for item in items for run in item.runs(token_ids)):
        ids[:, read:offset] = np.arange(following, following + offset - read)
        following += offset - read
        grid = np.indices(medium.grid)
        grid[0] = (grid[0] * medium.time_step).astype(np.int64)
        read = offset + medium.num_tokens
        ids[:, offset:read] = grid.reshape(3, -1) + following
        following += int(grid.max()) + 1
    ids[:, read:] = np.arange(following, following + len(token_ids) - read)
    return torch.from_numpy(ids), following - read


@dataclass(frozen=True)
class PrunedRow:
    """One prompt without its dropped tokens.

    Attributes:
        index: (L',) for each token its index in the unpruned prompt.
        positions: (3, L') int64.
        delta: Added to a later index of the pruned sequence, it gives the position ID there.
        plans: Those of its clips, with their layout.
    """

    index: IntArray
    positions: torch.Tensor
    delta: int
    plans: tuple[RetentionPlan, ...]


def prune_row(
    token_ids: IntArray,
    image_id: int,
    video_id: int,
    images: "Iterable[MediaItem]",
    clips: "Iterable[tuple[MediaItem, RetentionPlan]]",
) -> PrunedRow:
    """Prunes one prompt; takes as many of `images` and `clips` as it has, in order.

    Args:
        token_ids: (L,) the unpruned prompt without padding.
        image_id, video_id: The placeholders.
        images: Iterator over the images of the batch.
        clips: Iterator over the clips of the batch, with plans that have no layout yet.

    Raises:
        RequestError: The placeholders do not fit the media.
    """
    images, clips = iter(images), iter(clips)
    items: list[PositionRequest] = []
    plans: list[RetentionPlan] = []
    index: list[IntArray] = []
    read, written = 0, 0
    placeholders = np.flatnonzero((token_ids == image_id) | (token_ids == video_id))
    while len(placeholders := placeholders[np.searchsorted(placeholders, read) :]):
        start = int(placeholders[0])
        token = int(token_ids[start])
        plan = None
        if token == image_id:
            medium = next(images, None)
        else:
            medium, plan = next(clips, (None, None))
        at = placeholders[: medium.num_tokens if medium is not None else 0]
        if medium is None or not _fits(token_ids, at, medium):
            found = int((token_ids == token).sum())
            raise RequestError(
                f"The prompt has {found} placeholders of token {token}, but the grids given to the model do not fit "
                "them. Pass what the processor returned, unchanged."
            )
        index.append(np.arange(read, start))
        written += start - read
        read = int(at[-1]) + 1
        stays, span = np.arange(read - start), None
        if plan is not None:
            here = token_ids[start:read]
            layout = Layout(here, here == token, np.ones(medium.num_tokens, dtype=np.bool_))
            plan = plan.with_layout(layout, medium.position_span)
            plans.append(plan)
            stays, span = plan.prompt_index, ClipSpan(written, plan)
        items.append(PositionRequest(medium, written, span))
        index.append(start + stays)
        written += len(stays)
    index.append(np.arange(read, len(token_ids)))
    whole = np.concatenate(index)
    positions, delta = pruned_positions(
        token_ids[whole].tolist(),
        items,
        lambda item, offset: PlacedItem(offset, item.feature),  # type: ignore[arg-type]
        lay_out,
    )
    return PrunedRow(whole, positions, delta, tuple(plans))


def _fits(token_ids: IntArray, at: IntArray, medium: MediaItem) -> bool:
    """Whether the placeholders at `at` are those of `medium`: as many, alike, and in the runs that it has."""
    if len(at) != medium.num_tokens or (token_ids[at] != token_ids[at[0]]).any():
        return False
    runs = at.reshape(medium.grid[0] if medium.units_apart else 1, -1)
    return bool((np.diff(runs, axis=1) == 1).all())


@dataclass(frozen=True)
class Batch:
    """B pruned prompts, padded to the same length.

    Attributes:
        index: (B, L') int64, for each token its column in the unpruned batch; what is padding points anywhere.
        mask: (B, L') int64, 0 where there is padding.
        positions: (3, B, L') int64.
        deltas: (B, 1) int64, see `PrunedRow`.
        padded: Whether there is padding.
        plans: The plans of all clips in the order of the rows, with their layout.
    """

    index: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    deltas: torch.Tensor
    padded: bool
    plans: tuple[RetentionPlan, ...]

    def take(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """The columns of (B, L) `values` that stay: (B, L')."""
        index, mask = self.index.to(values.device), self.mask.to(values.device)
        return values.gather(1, index).masked_fill(mask == 0, padding)


def prune_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    placeholders: Mapping[str, int],
    images: Sequence[MediaItem],
    clips: Sequence[tuple[MediaItem, RetentionPlan]],
) -> Batch:
    """Prunes a batch. Padding stays on the side where it was; without any, new padding goes to the left.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 0 for padding, or None.
        placeholders: The ids of "image" and "video" tokens.
        images, clips: Those of the batch in the order of its rows; the plans have no layout.

    Raises:
        RequestError: The mask is not that of a padded batch, is padded on both sides, or media and placeholders do not
            fit.
    """
    rows, starts, right = [], [], None
    image_items, clip_items = iter(images), iter(clips)
    for number, row in enumerate(input_ids.cpu().numpy()):
        start, stop = 0, len(row)
        if attention_mask is not None:
            real = np.flatnonzero(attention_mask[number].cpu().numpy())
            start, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
            if not len(real) or stop - start != len(real) or (start > 0 and stop < len(row)):
                raise RequestError(
                    f"Row {number} of attention_mask is no sequence padded on one side (packed sequences are not "
                    "supported). Pad each row on the left or on the right."
                )
            for here, side in ((start > 0, False), (stop < len(row), True)):
                if here and right is not None and right != side:
                    raise RequestError("Some rows are padded on the left and some on the right. Pad them on one side.")
                right = side if here else right
        rows.append(prune_row(row[start:stop], placeholders["image"], placeholders["video"], image_items, clip_items))
        starts.append(start)
    left_over = len(list(image_items)) + len(list(clip_items))
    if left_over:
        raise RequestError(f"{left_over} images or clips have no placeholders in the prompts.")
    return _pad(rows, starts, bool(right))


def _pad(rows: Sequence[PrunedRow], starts: Sequence[int], right: bool) -> Batch:
    length = max(len(row.index) for row in rows)
    index = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(index)
    positions = torch.zeros(3, len(rows), length, dtype=torch.int64)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        used = len(row.index)
        here = slice(0, used) if right else slice(length - used, length)
        index[number, here] = torch.from_numpy(row.index) + start
        mask[number, here] = 1
        positions[:, number, here] = row.positions
        if row.positions.shape[1] != used:
            raise PlanError(f"{row.positions.shape[1]} position IDs for {used} tokens.")
    deltas = torch.tensor([[row.delta] for row in rows])
    plans = tuple(plan for row in rows for plan in row.plans)
    return Batch(index, mask, positions, deltas, bool((mask == 0).any()), plans)
