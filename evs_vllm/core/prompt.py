# SPDX-License-Identifier: Apache-2.0
"""Plan -> prompt: placeholders of kept tokens only, and back to the unpruned prompt for the position IDs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evs_vllm.core.plan import BoolArray, IntArray, RetentionPlan
from evs_vllm.errors import PlanError


def pruned_clip(plan: RetentionPlan) -> tuple[list[int], BoolArray]:
    """The clip's part of the pruned prompt.

    Returns:
        The token ids, a list of L' ints, and the (L',) bool flags of those that take an embedding row.
    """
    layout = plan.layout
    if layout is None:
        raise PlanError("A plan without a layout has no prompt.")
    return layout.token_ids[plan.prompt_index].tolist(), layout.is_embed[plan.prompt_index]


@dataclass(frozen=True)
class ClipSpan:
    """A clip in the pruned prompt: where it starts and the plan that made it."""

    offset: int
    plan: RetentionPlan


@dataclass(frozen=True)
class UnprunedPrompt:
    """The prompt as it was before pruning, as far as positions are concerned.

    Attributes:
        token_ids: (L,) the unpruned prompt.
        index: (L',) for each token of the pruned prompt its index in the unpruned one, ascending.
    """

    token_ids: IntArray
    index: IntArray

    def index_of(self, pruned_index: int) -> int:
        """The unpruned index of a pruned one; the end of the prompt maps to the end."""
        return int(self.index[pruned_index]) if pruned_index < len(self.index) else len(self.token_ids)


def unprune(token_ids: Sequence[int], clips: Sequence[ClipSpan]) -> UnprunedPrompt:
    """Puts the dropped placeholders of `clips` back.

    Args:
        token_ids: The pruned prompt, possibly followed by generated tokens.
        clips: The clips to expand; clips that are not listed are left as they are.

    Raises:
        PlanError: A clip does not lie within the prompt.
    """
    pruned = np.asarray(token_ids, dtype=np.int64)
    pieces: list[IntArray] = []
    index: list[IntArray] = []
    read, written = 0, 0
    for clip in sorted(clips, key=lambda c: c.offset):
        layout, stays = clip.plan.layout, clip.plan.prompt_index
        if layout is None or clip.offset < read or clip.offset + len(stays) > len(pruned):
            raise PlanError(f"A clip at {clip.offset} of {len(stays)} tokens does not fit a prompt of {len(pruned)}.")
        text = pruned[read : clip.offset]
        pieces += [text, layout.token_ids]
        index += [np.arange(written, written + len(text)), written + len(text) + stays]
        read = clip.offset + len(stays)
        written += len(text) + len(layout.token_ids)
    tail = pruned[read:]
    return UnprunedPrompt(
        np.concatenate([*pieces, tail]), np.concatenate([*index, np.arange(written, written + len(tail))])
    )
