# SPDX-License-Identifier: Apache-2.0
"""What a token looks like, in a few bytes: descriptors, whose L1 distance says how much a token changed.

They start from a low-resolution picture of every token, made of the frames before they were resized
(`evs_kernels.pool_frames`), or of the token's pixels where those are all there is (`evs_kernels.pool_tokens`); either
way a clip is read once.
All arithmetic is exact: integers, quotients and square roots that IEEE 754 rounds correctly, and matrix products of
integers whose sums stay below 2**24, which float32 holds exactly in whatever order a library adds them up. So equal
pixels have equal descriptors on every machine and device.
"""

from abc import ABC, abstractmethod

import torch

import evs_kernels
from evs_vllm.core.clip import Clip
from evs_vllm.errors import UnsupportedError

NOISE_LEVELS = 6
"""Grey levels that are added to the contrast of a place before values are divided by it: flat places have noise."""

SPREAD = 32
"""What a normalised value of one standard deviation is."""

_GAIN_BITS = 20  # of the fixed-point quotient; products with it stay below 2**31


def low_resolution(clip: Clip, cells: int) -> torch.Tensor:
    """The low-resolution picture of a clip.

    Args:
        clip: T units of H x W tokens, with pixels of three channels.
        cells: Cells along one side of a token.

    Returns:
        (T, H, W, cells, cells, 3) uint8, each cell the mean over its pixels and the frames of the unit: the
        pixels of `Clip.source`, or of `Clip.tokens` where there is none.

    Raises:
        UnsupportedError: The clip has no source and does not say how its pixels are ordered.
    """
    if clip.source is not None:
        units, rows, columns = clip.grid
        picture = evs_kernels.pool_frames(
            clip.source.frames, rows * cells, columns * cells, unit_frames=clip.source.unit_frames
        )
        return picture.view(units, rows, cells, columns, cells, -1).transpose(2, 3).contiguous()
    if clip.pixels is None:
        raise UnsupportedError(
            "This clip does not say where in a token its pixels are (Clip.pixels), which every selection but 'paper' "
            "looks at. Give it, or select by 'paper'."
        )
    order = clip.pixels
    pooled = evs_kernels.pool_tokens(clip.tokens, order.merge, order.channels, order.frames, order.side, cells)
    return pooled.view(-1, *clip.grid[1:], cells, cells, order.channels)


def normalised(cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divides every cell by the contrast around its token.

    Mean m and standard deviation s of a channel are those of the cells of the token and its 8 neighbours, which weigh
    1 2 1, 2 4 2, 1 2 1; beyond the border the outermost tokens repeat.

    Args:
        cells: (T, H, W, C, C, 3) uint8.

    Returns:
        ``SPREAD * (cell - m) / (s + NOISE_LEVELS)``, rounded and cut to -127..127, as (T, H, W, C, C, 3) int32; m and
        s, rounded, as (T, H, W, 3) int32.
    """
    count = 16 * cells.shape[3] ** 2
    values = cells.to(torch.int32)
    total = _around(values.sum(dim=(3, 4), dtype=torch.int32))
    squares = _around((values * values).sum(dim=(3, 4), dtype=torch.int32))
    # float64 holds these integers, up to 2**48, exactly.
    deviation = (count * squares.double() - total.double() ** 2).sqrt() / count
    gain = ((SPREAD << _GAIN_BITS) // count / (deviation + NOISE_LEVELS)).to(torch.int32)
    scaled = (values * count - total[:, :, :, None, None]) * gain[:, :, :, None, None]
    rounded = ((scaled + (1 << (_GAIN_BITS - 1))) >> _GAIN_BITS).clamp_(-127, 127)
    return rounded, (total + count // 2) // count, deviation.round().to(torch.int32)


def _around(values: torch.Tensor) -> torch.Tensor:
    """Sums of (T, H, W, 3) integers over every token and its 8 neighbours, weighted 1 2 1 each way."""
    for axis in (1, 2):
        size = values.shape[axis]
        wide = torch.cat([values.narrow(axis, 0, 1), values, values.narrow(axis, size - 1, 1)], dim=axis)
        values = wide.narrow(axis, 0, size) + 2 * values + wide.narrow(axis, 2, size)
    return values


class Descriptor(ABC):
    """A way to describe tokens.

    Attributes:
        name: Tells it from others.
        unit: The L1 distance that the option ``threshold`` counts as 1.
        counts: What that is, in words.
    """

    name: str
    unit: float
    counts: str

    @abstractmethod
    def make(self, clip: Clip) -> torch.Tensor:
        """Describes every token; `describe` says what is returned."""

    def describe(self, clip: Clip) -> torch.Tensor:
        """Describes every token, once for each clip.

        Args:
            clip: The clip.

        Returns:
            (T, P, F) uint8, contiguous, on the clip's device.

        Raises:
            UnsupportedError: The clip does not say how its pixels are ordered.
        """
        if self.name not in clip.described:
            clip.described[self.name] = self.make(clip)
        return clip.described[self.name]


class Contrast(Descriptor):
    """2 x 2 cells a token, divided by the contrast around it, beside the mean colour around it.

    A threshold counts hundredths of the local standard deviation, in the mean over the cells.
    """

    name = "contrast"
    unit = 12 * SPREAD / 100
    counts = "hundredths of the local contrast"

    def make(self, clip: Clip) -> torch.Tensor:
        values, means, _ = normalised(low_resolution(clip, 4))
        units, rows, columns = values.shape[:3]
        quarters = values.view(units, rows, columns, 2, 2, 2, 2, 3).sum(dim=(4, 6), dtype=torch.int32)
        # 40 grey levels of brightness weigh as much as one standard deviation of every cell.
        colour = means.repeat_interleave(4 * SPREAD // 40, dim=3)
        parts = [((quarters + 2) >> 2).flatten(3) + 128, colour]
        return torch.cat(parts, dim=3).to(torch.uint8).flatten(1, 2)
