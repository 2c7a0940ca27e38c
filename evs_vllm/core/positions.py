# SPDX-License-Identifier: Apache-2.0
"""Plan -> position IDs, by construction: lay out the unpruned prompt, ask the model's own method, gather.

`keep`: a kept token has the ID it had in the unpruned prompt and the text after the clip continues where it would have.
`sequential`: kept tokens are numbered one after the other like text, as if the dropped ones had never been there.
Source: arXiv 2510.14624, whose tables compare the two. IDs stay integers all the way.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from evs_vllm.core.prompt import ClipSpan, unprune

if TYPE_CHECKING:
    import torch

Feature = TypeVar("Feature")


class PositionRequest(NamedTuple):
    """One multimodal item of a pruned prompt.

    Attributes:
        feature: The engine's description of the item.
        offset: Where it starts in the pruned prompt.
        clip: Its plan with that offset, or None if the item was not pruned.
    """

    feature: object
    offset: int
    clip: ClipSpan | None


def pruned_positions(
    token_ids: Sequence[int],
    items: Sequence[PositionRequest],
    move: Callable[[PositionRequest, int], Feature],
    stock: Callable[[list[int], list[Feature]], tuple["torch.Tensor", int]],
) -> tuple["torch.Tensor", int]:
    """Position IDs of a prompt with pruned clips.

    Args:
        token_ids: The pruned prompt, L' ids.
        items: Its multimodal items.
        move: (item, offset) -> the item's feature as the unpruned prompt would have it, at that offset.
        stock: The model's own method: (token ids, features) -> (positions (axes, L) int64, delta).

    Returns:
        positions (axes, L') int64, and the delta that, added to a later index of the pruned sequence, gives its ID.
    """
    # A sequential clip is text to the stock method: its item is left out and its placeholders are not expanded.
    kept = [item for item in items if item.clip is None or item.clip.plan.positions == "keep"]
    full = unprune(token_ids, [item.clip for item in kept if item.clip is not None])
    features = []
    for item in sorted(kept, key=lambda item: item.offset):
        # A clip begins where its first token would stand, whether that one stays or not.
        dropped = 0 if item.clip is None else int(item.clip.plan.prompt_index[0])
        features.append(move(item, full.index_of(item.offset) - dropped))
    positions, delta = stock(full.token_ids.tolist(), features)
    # The stock delta counts from the unpruned length, generation counts from the pruned one.
    return positions[:, full.index], delta + len(full.token_ids) - len(token_ids)
