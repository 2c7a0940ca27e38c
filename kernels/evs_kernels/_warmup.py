# SPDX-License-Identifier: Apache-2.0
"""Compile ahead of the first request."""

from collections.abc import Sequence

import torch

from .cosine_score import cosine_score
from .place_blocks import place_blocks
from .pool_frames import pool_frames
from .pool_tokens import pool_tokens
from .prune_topk import prune_topk
from .resize_patches import resize_patches
from .select_anchored import select_anchored
from .select_hold import select_hold
from .select_threshold import select_threshold
from .select_topk import select_topk
from .temporal_score import temporal_score

# What the pixels of a token are in the models we know: (merge, channels, frames, side). Qwen2-VL and Qwen2.5-VL,
# Qwen3-VL, InternVL.
_LAYOUTS = ((2, 3, 2, 14), (2, 3, 2, 16), (1, 3, 1, 28))

# Values of the descriptors that evs_vllm makes. Triton compiles apart for each power of two that holds them, and for
# rows of whole 16-byte groups and others.
_WIDTHS = (32, 18)


# Places of a clip of 3 units that the GPU's selection takes for a large one (select_topk's SEARCHED).
_MANY = 6000


def warmup(*, device: str | torch.device = "cpu", dtypes: Sequence[torch.dtype] = (torch.uint8,)) -> None:
    """Compiles every kernel that ``backend="auto"`` would use, so that the first request does not wait for it.

    The CPU kernels are kept in numba's disk cache (NUMBA_CACHE_DIR, see kernels/README.md), the GPU kernels in
    Triton's (TRITON_CACHE_DIR): a second process takes them from there.

    Args:
        device: where the clips will be.
        dtypes: token dtypes to expect.

    Raises:
        TypeError: a dtype that temporal_score does not take.
    """
    # Triton compiles apart for rows of whole groups of 16 elements (of bytes, also of 16 such groups) and for others,
    # and uses more kernels for rows longer than one program takes. numba does not care.
    depths = (2048, 2064, 2049)
    for dtype in dtypes:
        for depth in depths:
            tokens = torch.ones((3, 2, depth), dtype=dtype, device=device)
            scores = temporal_score(tokens)
            for reserved in (0, 1):
                prune_topk(tokens, 4, min_per_unit=reserved)
                select_topk(scores, 4, min_per_unit=reserved)
                select_threshold(scores, 1, min_per_unit=reserved)
                select_topk(scores.new_ones((3, _MANY)), _MANY + 1, min_per_unit=reserved)
            if dtype.is_floating_point:
                cosine_score(tokens)
    _warm_descriptors(device)
    _warm_frames(device)


def _warm_descriptors(device: str | torch.device) -> None:
    for merge, channels, frames, side in _LAYOUTS:
        depth = merge**2 * channels * frames * side**2
        pixels = torch.ones((3, 2, depth), dtype=torch.uint8, device=device)
        for cells in (4, 5):  # cells within patches and across their borders are different kernels of the CPU
            pool_tokens(pixels, merge, channels, frames, side, cells)
    for width in _WIDTHS:
        descriptors = torch.zeros((3, 2, width), dtype=torch.uint8, device=device)
        descriptors[1] = 255  # more change than the budget has room for, so that a level is looked for
        forced = torch.zeros(descriptors.shape[:2], dtype=torch.bool, device=device)
        for reserved in (0, 1):
            for mask in (None, forced):
                select_anchored(descriptors, 4, threshold=9, min_per_unit=reserved, forced=mask)
            select_hold(descriptors, 4, min_per_unit=reserved)


def _warm_frames(device: str | torch.device) -> None:
    for merge, channels, unit_frames, side in _LAYOUTS:
        # Of a size of no tokens, and of tokens: numba does not care, Triton may.
        for height, width in ((61, 90), (64, 128)):
            frames = torch.ones((3, height, width, channels), dtype=torch.uint8, device=device)
            size = merge * side
            pool_frames(frames, 8, 12, unit_frames)
            resize_patches(frames, 2 * size, 3 * size, None, merge, side, unit_frames)
    for dtype in (torch.bfloat16, torch.float32):
        blocks = torch.ones((5, 3 * 28 * 28), dtype=torch.uint8, device=device)
        place_blocks(blocks, torch.ones((3, 256), dtype=dtype, device=device), 2, 2)
