# SPDX-License-Identifier: Apache-2.0
"""Watched processors that are vLLM's own, for models that transformers does not have."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

import evs_kernels
from evs_vllm.core.clip import Source
from evs_vllm.families.seen import SeenFrames, SeenRows
from evs_vllm.families.watched import (
    BICUBIC,
    Watched,
    attributes_of,
    bytes_of_colours,
    current_watch,
    levels_of,
    stock_of,
    unknown,
)


class WatchedInternVL(Watched):
    """Goes before the class of vLLM's video processor for InternVL's own format, which squashes frames by Pillow."""

    def _videos_to_pixel_values_lst(self: Any, videos: Sequence[Any]) -> Any:
        watch, make = current_watch(), super()._videos_to_pixel_values_lst  # type: ignore[misc]
        if watch is None or watch.squares is None:
            return make(videos)
        fits = self.image_size == watch.squares.pixels
        why = "" if watch.leave_rows else "pixels are wanted"
        if not why:
            why = unknown(self) or ("" if fits else f"frames become {self.image_size} pixels wide")
        if not why and not all(map(bytes_of_colours, videos)):
            why = "the frames are no arrays of uint8 (F, H, W, 3)"
        if not why and not all(_pillow_agrees(*video.shape[1:3], self.image_size) for video in videos):
            why = "Pillow resizes frames of this shape in another order"
        levels: torch.Tensor | None = None
        if why:
            made = make(videos)
        else:
            levels = _pillow_levels(stock_of(type(self)), self.image_size)
            made = [levels.new_empty(len(video), 0) for video in videos]
        for video in videos:
            source = None
            if fits and bytes_of_colours(video):
                source = Source(torch.from_numpy(np.ascontiguousarray(video)), 1)
            watch.seen.append(SeenFrames(source, why, levels, watch.squares, "pillow"))
        return made


class WatchedOvis(Watched):
    """Goes before the class of vLLM's processor for Ovis2.5, which has no video processor."""

    def preprocess_multidata(self: Any, images: Any = None, video: Any = None, **kwargs: Any) -> Any:
        watch, make = current_watch(), super().preprocess_multidata  # type: ignore[misc]
        if watch is None or video is None:
            return make(images=images, video=video, **kwargs)
        why = unknown(self) if watch.leave_rows else "pixels are wanted"
        frames = _as_bytes(video)
        if not why and frames is None:
            why = "the frames are neither arrays (F, H, W, 3) nor RGB images of one size"
        why = why or _why_other_images(self.image_processor)
        if not why and self.temporal_patch_size != 1:
            why = f"units have {self.temporal_patch_size} frames"
        # What it says of one frame holds for all.
        pixels, placeholders, grid = make(video=video if why or frames is None else frames[:1], **kwargs)
        units, height, width = (int(size) for size in grid[0])
        if not why:
            assert frames is not None
            units = len(frames)
            grid = torch.tensor([[units, height, width]])
            pixels = torch.empty(units * height * width, 0, dtype=pixels.dtype)
            placeholders = self.construct_visual_placeholders(grid[0].tolist(), True)
        source = None
        if frames is not None and units == len(frames):
            source = Source(torch.from_numpy(np.ascontiguousarray(frames)), 1)
        levels = None if why else levels_of(self.image_processor, attributes_of(self.image_processor))
        watch.seen.append(SeenRows(source, why, levels, (units, height, width), self.patch_size, self.hidden_stride))
        return pixels, placeholders, grid


def _as_bytes(video: Any) -> np.ndarray | None:
    """The frames of a video as Ovis2.5's processor takes them, (F, H, W, 3) uint8; None if it is another kind."""
    if isinstance(video, list) and video and all(getattr(image, "mode", "") == "RGB" for image in video):
        if len({image.size for image in video}) == 1:
            return np.stack([np.asarray(image) for image in video])
    elif isinstance(video, np.ndarray) and video.ndim == 4 and video.shape[3] == 3:
        return video.astype(np.uint8, copy=False)
    return None


def _why_other_images(processor: Any) -> str:
    """Why an image processor does not resize and normalise as transformers' for SigLIP does, or ""."""
    if type(processor).__name__ != "SiglipImageProcessor":
        return f"what {type(processor).__name__} does with pixels is not known"
    if not processor.do_resize or getattr(processor.resample, "value", processor.resample) not in BICUBIC:
        return f"resample is {processor.resample!r}"
    if getattr(processor, "do_center_crop", None) or getattr(processor, "do_pad", None):
        return "frames are cropped or padded"
    return ""


@cache
def _pillow_levels(stock: Any, size: int) -> torch.Tensor:
    """As `levels_of`, of vLLM's processor for InternVL."""
    values = (np.arange(size * size) % 256).astype(np.uint8).reshape(1, size, size)
    (pixels,) = stock(size)._videos_to_pixel_values_lst([np.stack([values] * 3, axis=3)])
    levels: torch.Tensor = pixels[0].flatten(1)[:, :256].contiguous()
    if levels.shape != (3, 256):
        raise ValueError(f"frames of {size} x {size} pixels do not show what becomes of 256 values")
    return levels


@lru_cache(maxsize=1024)
def _pillow_agrees(height: int, width: int, size: int) -> bool:
    """Whether Pillow squashes a frame of this size as `evs_kernels.resize_patches` does.

    From version 13 on it begins with the rows where a frame shrinks more in height: tried on a noisy frame.
    """
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    frame[:, ::2] = frame[:, ::2] // 128 * 255
    resized = np.asarray(Image.fromarray(frame[0]).resize((size, size))).transpose(2, 0, 1)
    ours = evs_kernels.resize_patches(torch.from_numpy(frame), size, size, None, 1, size, 1, arithmetic="pillow")
    return np.array_equal(ours.view(3, size, size).numpy(), resized)
