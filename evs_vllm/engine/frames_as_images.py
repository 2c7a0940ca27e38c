# SPDX-License-Identifier: Apache-2.0
"""Videos that clients send as images, frame by frame: they cannot be pruned, but be noticed."""

from itertools import groupby
from typing import Any

from vllm.multimodal.parse import ImageProcessorItems

FRAMES_IN_A_ROW = 4
"""So many images of one size look like frames of a video."""


def look_like_frames(images: Any) -> bool:
    """Whether `FRAMES_IN_A_ROW` images of a request have one size: a client may send a video so.

    Args:
        images: vLLM's items of the modality, or None; embeddings have no size.
    """
    if not isinstance(images, ImageProcessorItems):
        return False
    # What the processor cache holds already comes without its pixels.
    sizes = [None if images.get(i) is None else images.get_image_size(i) for i in range(images.get_count())]
    runs = ((size, len(list(run))) for size, run in groupby(sizes))
    return any(size is not None and length >= FRAMES_IN_A_ROW for size, length in runs)
