# SPDX-License-Identifier: Apache-2.0
"""resize_patches: the pixel rows of some tokens, from the frames as a decoder gives them."""

import functools

import torch

from .. import _validate
from .._dispatch import implementation
from ._weights import ARITHMETICS


def resize_patches(
    frames: torch.Tensor,
    height: int,
    width: int,
    tokens: torch.Tensor | None,
    merge: int,
    side: int,
    unit_frames: int = 2,
    *,
    arithmetic: str = "torch",
    backend: str = "auto",
) -> torch.Tensor:
    """Resizes frames and lays out the pixels of tokens, and of those only that are asked for.

    The picture of ``height`` x ``width`` pixels is what ``torch.nn.functional.interpolate(mode="bicubic",
    antialias=True)`` makes on a CPU of a uint8 tensor (F, C, H, W), as the video processors of the Qwen-VL models do it
    through torchvision: per axis in integers, columns first, rounded to uint8 between; a picture of that size already
    is taken as it is. Or it is what Pillow's ``Image.resize`` makes with its bicubic filter: the same with finer
    weights, so that here and there a value differs by one. (From version 13 on, Pillow begins with the rows where a
    picture shrinks more in height than in width; that is not followed.) Tokens are squares of ``S = merge * side``
    pixels, P of them in a temporal unit, row after row; where F is not a multiple of ``unit_frames``, the last frame
    stands for those that the last unit lacks. The values of a token are laid out as (patch row, patch column, channel,
    frame, pixel row, pixel column).

    Args:
        frames: (F, H, W, C) uint8, contiguous, every dimension >= 1; any device.
        height: pixels of a resized frame from top to bottom; a multiple of S.
        width: pixels of a resized frame from left to right; a multiple of S.
        tokens: (K,) int64, contiguous, strictly ascending flat indices ``t * P + p``, on the CPU wherever the frames
            are; or None for all of them.
        merge: patches along the side of a token; >= 1.
        side: pixels along the side of a patch; >= 1.
        unit_frames: frames in a temporal unit; >= 1.
        arithmetic: ``"torch"`` or ``"pillow"``, whose integers.
        backend: one of ``evs_kernels.BACKENDS``. cpu is fast for three channels, and many times slower for other
            numbers of them.

    Returns:
        (K, D) uint8 on the frames' device with ``D = merge**2 * C * unit_frames * side**2``, the same in every backend.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong rank, empty frames, not contiguous, indices that do not ascend or are not tokens, a number out
            of range, frames of more than 2**31 values, more than 2**30 tokens, or a backend that cannot run here.
    """
    _validate.frames("frames", frames)
    merge, side = _validate.count("merge", merge, smallest=1), _validate.count("side", side, smallest=1)
    unit_frames = _validate.count("unit_frames", unit_frames, smallest=1)
    height = _validate.multiple("height", height, merge * side)
    width = _validate.multiple("width", width, merge * side)
    _validate.resized(frames, height, width)
    per_unit = (height // (merge * side)) * (width // (merge * side))
    total = -(-frames.shape[0] // unit_frames) * per_unit
    if total > _validate.MAX_TOKENS:
        raise ValueError(f"frames: got {total} tokens; allowed: <= {_validate.MAX_TOKENS}. Split the clip.")
    if tokens is None:
        tokens = torch.arange(total)
    else:
        _validate.token_indices("tokens", tokens, total)
    _validate.choice("arithmetic", arithmetic, ARITHMETICS)
    run = implementation("resize_patches", backend, frames.device)
    return run(frames, height, width, tokens, merge, side, unit_frames, arithmetic)


@functools.cache
def resize_matches_torch() -> bool:
    """Says whether the torch that is installed resizes as `resize_patches` does on a CPU.

    Resizes a few small noisy pictures both ways, with and against their grain, once in a process. Another version or
    build of torch may compute other weights: its own processor then has to run.
    """
    generator = torch.Generator().manual_seed(0)
    for source, target in (((45, 61), (56, 28)), ((30, 90), (28, 140)), ((28, 97), (28, 56)), ((120, 84), (28, 84))):
        noise = torch.randint(0, 256, (2, *source, 3), dtype=torch.uint8, generator=generator)
        frames = torch.stack([noise[0], noise[1] // 128 * 255])
        ours = resize_patches(frames, *target, None, 1, 1, 1, backend="cpu")
        for pictures in (frames.permute(0, 3, 1, 2), frames.permute(0, 3, 1, 2).contiguous()):
            try:
                resized = torch.nn.functional.interpolate(
                    pictures, target, mode="bicubic", align_corners=False, antialias=True
                )
            except (RuntimeError, NotImplementedError):  # a torch that has no such resize of uint8
                return False
            if not torch.equal(ours.view(2, *target, 3), resized.permute(0, 2, 3, 1)):
                return False
    return True
