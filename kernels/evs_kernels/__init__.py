# SPDX-License-Identifier: Apache-2.0
"""Kernels of Efficient Video Sampling: score and select; each as plain torch, numba (CPU) and Triton."""

from ._dispatch import BACKENDS, OPS, supported
from ._types import Selection
from ._warmup import warmup
from .cosine_score import cosine_score
from .place_blocks import place_blocks
from .pool_frames import pool_frames
from .pool_tokens import pool_tokens
from .prune_topk import prune_topk
from .resize_patches import resize_matches_torch, resize_patches
from .select_anchored import select_anchored
from .select_hold import select_hold
from .select_threshold import select_threshold
from .select_topk import select_topk
from .temporal_score import temporal_score

__all__ = [
    "BACKENDS",
    "OPS",
    "Selection",
    "cosine_score",
    "place_blocks",
    "pool_frames",
    "pool_tokens",
    "prune_topk",
    "resize_matches_torch",
    "resize_patches",
    "select_anchored",
    "select_hold",
    "select_threshold",
    "select_topk",
    "supported",
    "temporal_score",
    "warmup",
]
