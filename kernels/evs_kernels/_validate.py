# SPDX-License-Identifier: Apache-2.0
"""Checks at the public edge. Every message says what is wrong, what came, what is allowed and what to do."""

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch

SCORE_DTYPES = (torch.int32, torch.float32)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKEN_DTYPES = (torch.uint8, *FLOAT_DTYPES)

# Positions inside a clip are int32 in the kernels; half the range leaves room for a block past the end.
MAX_TOKENS = 2**30
# The largest depth whose worst case, 255 at every byte, still fits an int32 score.
MAX_UINT8_DEPTH = (2**31 - 1) // 255
# 255 * 256 * 4096 < 2**30: a weighted distance between two descriptors is an int32 with room to spare.
MAX_DESCRIPTOR = 256
MAX_WEIGHT = 4096
# Over a block of 32 units; prices and two such costs are added up in an int32.
MAX_HOLD = 2**29 // 32
# 511 * 2**22 < 2**31: rounding a mean half up needs twice the sum and the number of values in an int32.
MAX_PIXELS = 2**22
# Places in a frame are int32 in the kernels.
MAX_FRAME = 2**31
# A sum of 255 times the 2**16 parts of every pixel of a unit, doubled to round it, is an int64 with room to spare.
MAX_UNIT = 2**38


def tensor(name: str, value: object, axes: str, dtypes: Iterable[torch.dtype] | None, *, smallest: int = 1) -> None:
    """Checks a dense tensor; ``axes`` names its dimensions, for example "TPD"."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: torch.Tensor. Convert it with torch.as_tensor.")
    shape = tuple(value.shape)
    if value.ndim != len(axes):
        raise ValueError(f"{name}: got shape {shape}; allowed: ({', '.join(axes)}). Reshape it.")
    if min(shape) < smallest:
        raise ValueError(f"{name}: got shape {shape}; allowed: every dimension >= {smallest}. Skip empty clips.")
    if dtypes is not None and value.dtype not in (allowed := tuple(dtypes)):
        names = ", ".join(str(d) for d in allowed)
        raise TypeError(f"{name}: got dtype {value.dtype}; allowed: {names}. Convert it with .to(dtype).")
    if not value.is_contiguous():
        raise ValueError(
            f"{name}: got strides {value.stride()} for shape {shape}; allowed: contiguous. "
            "Call .contiguous() (no hidden copy is made, because a clip is large)."
        )


def clip_tokens(name: str, value: torch.Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Checks (T, P, D) tokens, and that their score cannot wrap around."""
    tensor(name, value, "TPD", dtypes)
    clip_size(name, value)
    if value.dtype == torch.uint8 and value.shape[2] > MAX_UINT8_DEPTH:
        raise ValueError(
            f"{name}: got D={value.shape[2]} with uint8; allowed: D <= {MAX_UINT8_DEPTH}, where an int32 score "
            "cannot overflow. Convert the tokens to float32."
        )


def clip_scores(value: torch.Tensor) -> None:
    """Checks (T, P) scores. NaN is looked for on the CPU only: on a GPU the check would stall the stream."""
    tensor("scores", value, "TP", SCORE_DTYPES)
    clip_size("scores", value)
    if value.device.type == "cpu" and value.is_floating_point() and np.isnan(value.numpy()).any():
        raise ValueError("scores: got NaN; allowed: numbers and infinities. Replace NaN before selecting.")


def clip_size(name: str, value: torch.Tensor) -> None:
    """Checks that a clip's token count fits the kernels' int32 positions."""
    tokens = value.shape[0] * value.shape[1]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{name}: got T*P={tokens} tokens; allowed: <= {MAX_TOKENS}. Split the clip.")


def descriptors(name: str, value: torch.Tensor) -> None:
    """Checks (T, P, F) uint8 descriptors, and that a weighted distance between two fits an int32."""
    tensor(name, value, "TPF", (torch.uint8,))
    clip_size(name, value)
    if value.shape[2] > MAX_DESCRIPTOR:
        raise ValueError(
            f"{name}: got F={value.shape[2]}; allowed: F <= {MAX_DESCRIPTOR}. Describe a token by fewer values, for "
            "example pool_tokens with fewer cells."
        )


def unit_weights(name: str, value: torch.Tensor, units: int) -> None:
    """Checks (T,) weights of temporal units; on the CPU, so that looking at them makes nobody wait."""
    tensor(name, value, "T", (torch.int32,))
    if value.device.type != "cpu":
        raise ValueError(f"{name}: got device {value.device}; allowed: cpu, wherever the clip is. Call .cpu() early.")
    if len(value) != units:
        raise ValueError(f"{name}: got {len(value)} of them; allowed: {units}, one for each temporal unit.")
    least, most = int(value.min()), int(value.max())
    if least < 0 or most > MAX_WEIGHT:
        raise ValueError(
            f"{name}: got values from {least} to {most}; allowed: 0 to {MAX_WEIGHT}. Only their ratios matter to a "
            "budget, so scale them down."
        )


def token_mask(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Checks a (T, P) bool mask of the tokens of ``other``."""
    tensor(name, value, "TP", (torch.bool,))
    same_device(name, value, other_name, other)
    if value.shape != other.shape[:2]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; allowed: {tuple(other.shape[:2])}, one for each token of "
            f"{other_name}."
        )


def count(name: str, value: int, *, smallest: int = 0) -> int:
    """Returns ``value`` as an int of at least ``smallest``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}; allowed: an integer >= {smallest}. Round it as you mean it.") from None
    if number < smallest:
        raise ValueError(f"{name}: got {number}; allowed: an integer >= {smallest}. Pass {smallest} for the least.")
    return number


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Checks that two tensors live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: got device {value.device}; allowed: {other.device}, where {other_name} is. Move one of them."
        )


def hold_weights(name: str, value: torch.Tensor, units: int, width: int) -> None:
    """Checks weights of units, and that no sum of weighted distances over a block leaves int32."""
    unit_weights(name, value, units)
    most = MAX_HOLD // (255 * width)
    if (highest := int(value.max())) > most:
        raise ValueError(
            f"{name}: got {highest}; allowed: 0 to {most} for descriptors of {width} values. Scale them down."
        )


def pixels(name: str, value: torch.Tensor, merge: int, channels: int, frames: int, side: int) -> None:
    """Checks (T, P, D) uint8 tokens of merge x merge patches, and that twice the sum of their values fits an int32."""
    tensor(name, value, "TPD", (torch.uint8,))
    clip_size(name, value)
    depth = merge**2 * channels * frames * side**2
    if value.shape[2] != depth:
        raise ValueError(
            f"{name}: got D={value.shape[2]}; allowed: {depth} = merge**2 * channels * frames * side**2, with "
            f"merge={merge}, channels={channels}, frames={frames}, side={side}. Pass the numbers of the model."
        )
    if depth > MAX_PIXELS:
        raise ValueError(f"{name}: got D={depth}; allowed: D <= {MAX_PIXELS}. Make the tokens smaller.")


def frames(name: str, value: torch.Tensor) -> None:
    """Checks (F, H, W, C) uint8 frames."""
    tensor(name, value, "FHWC", (torch.uint8,))
    if (size := value[0].numel()) > MAX_FRAME:
        raise ValueError(f"{name}: got {size} values in each; allowed: <= {MAX_FRAME}. Shrink them first.")


def unit_size(value: torch.Tensor, unit_frames: int) -> None:
    """Checks that no sum over the frames of a temporal unit wraps around."""
    if (size := value[0].numel() * unit_frames) > MAX_UNIT:
        raise ValueError(f"unit_frames: got {size} values in a unit; allowed: <= {MAX_UNIT}. Pass fewer frames.")


def cells(name: str, value: int, pixels: int) -> int:
    """Returns ``value`` as a number of cells that are each a 256th of a pixel wide at least."""
    number = count(name, value, smallest=1)
    if number > 256 * pixels:
        raise ValueError(f"{name}: got {number}; allowed: 1 to {256 * pixels}, 256 for each pixel. Pass fewer.")
    return number


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Checks that a name is one of a few."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}.")


def multiple(name: str, value: int, of: int) -> int:
    """Returns ``value`` as a positive multiple of ``of``."""
    number = count(name, value, smallest=1)
    if number % of:
        raise ValueError(f"{name}: got {number}; allowed: multiples of {of} = merge * side. Round it.")
    return number


def resized(value: torch.Tensor, height: int, width: int) -> None:
    """Checks that resized frames, and those between the two passes, are no larger than frames may be."""
    channels = value.shape[3]
    if (size := max(height, value.shape[1]) * width * channels) > MAX_FRAME:
        raise ValueError(
            f"height, width: got {height} x {width}, which takes {size} values; allowed: {MAX_FRAME}. Make it smaller."
        )


def token_indices(name: str, value: torch.Tensor, total: int) -> None:
    """Checks (K,) strictly ascending flat indices below ``total``; on the CPU, so that looking makes nobody wait."""
    tensor(name, value, "K", (torch.int64,), smallest=0)
    if value.device.type != "cpu":
        raise ValueError(f"{name}: got device {value.device}; allowed: cpu, wherever the clip is. Call .cpu() early.")
    indices = value.numpy()
    if len(indices) and (indices[0] < 0 or indices[-1] >= total):
        raise ValueError(
            f"{name}: got indices from {indices[0]} to {indices[-1]}; allowed: 0 to {total - 1}. Check the grid."
        )
    if (np.diff(indices) < 1).any():
        raise ValueError(f"{name}: got indices that do not ascend; allowed: strictly ascending. Sort them.")


def levels(value: torch.Tensor, blocks: torch.Tensor) -> None:
    """Checks that a table has a level for every byte, where the blocks are."""
    if value.shape[1] != 256:
        raise ValueError(f"levels: got shape {tuple(value.shape)}; allowed: (C, 256), one for every byte.")
    if value.device != blocks.device:
        raise ValueError(f"levels: got device {value.device}; allowed: {blocks.device}, where the blocks are. Move it.")


def square(name: str, depth: int, channels: int) -> int:
    """The side of square blocks of so many values."""
    side = math.isqrt(depth // channels)
    if channels * side * side != depth:
        raise ValueError(f"{name}: got D={depth}; allowed: C * S * S for {channels} channels. Check the levels.")
    return side


def result(name: str, value: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Checks memory for a result: its shape, and the dtype and device of another tensor."""
    tensor(name, value, "NCHW", (like.dtype,))
    if tuple(value.shape) != shape or value.device != like.device:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} on {value.device}; allowed: {shape} on {like.device}. Leave it "
            "out."
        )
