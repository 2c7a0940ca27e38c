# SPDX-License-Identifier: Apache-2.0
"""A clip as the judge sees it."""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class TokenPixels:
    """How the pixel values of a token's row are ordered: merge row, merge column, channel, frame, pixel row, column.

    Attributes:
        merge: Patches along one side of a token.
        channels: Colour channels.
        frames: Frames of a temporal unit.
        side: Pixels along one side of a patch.
    """

    merge: int
    channels: int
    frames: int
    side: int

    @property
    def values(self) -> int:
        """D, the length of a row."""
        return self.merge**2 * self.channels * self.frames * self.side**2


@dataclass(frozen=True)
class Source:
    """A clip's frames before anything was resized.

    Attributes:
        frames: (F, height, width, 3) uint8, contiguous, CPU or CUDA, at least one.
        unit_frames: Frames of a temporal unit; the last frame stands for those that the last unit lacks.
    """

    frames: torch.Tensor
    unit_frames: int


@dataclass(frozen=True)
class Anchors:
    """What the clips of a stream leave behind for the next one: what was last shown of each place.

    Attributes:
        looks: (P, F) uint8, for each place what `evs_vllm.core.scorers.Selection.looks` says of the token that was last
            kept there.
        grid: (H, W) of the units that it was made of, H*W == P.
        saved: Tokens that the rate allowed and still scenes did not need: so many more than its share may the next clip
            keep.
    """

    looks: torch.Tensor
    grid: tuple[int, int]
    saved: int = 0


@dataclass(frozen=True)
class Clip:
    """A clip, its pixels as one row per language-model token.

    Attributes:
        tokens: (T, P, D) uint8, contiguous, CPU or CUDA, as the processor resized them. Without data, on torch's device
            "meta", where nothing reads them: with a source, only selections with `reads_pixels` do.
        grid: (T, H, W) with H*W == P.
        pixels: How a row is ordered, for selections that look at where a pixel is; None where that is not known.
        previous: What earlier clips of its stream left, for a clip that goes on from them (`after`). None for a clip
            that stands alone, whose unit 0 is kept whole.
        source: What the low-resolution picture of the clip is made from. None for `tokens`, which is the same where
            nothing was resized.
        starts: (T,) seconds at which each unit begins, or None where the video does not say.
        described: Descriptors of this clip by name, as `evs_vllm.core.descriptors` makes them; each is made once.
    """

    tokens: torch.Tensor
    grid: tuple[int, int, int]
    pixels: TokenPixels | None = None
    previous: Anchors | None = None
    starts: tuple[float, ...] | None = None
    source: Source | None = None
    described: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_units(self) -> int:
        return self.grid[0]

    @property
    def tokens_per_unit(self) -> int:
        return self.grid[1] * self.grid[2]

    def after(self, anchors: Anchors | None) -> "Clip":
        """The clip as the next one of a stream; if its units are of another grid, it stands alone and starts anew."""
        goes_on = anchors is not None and anchors.grid == self.grid[1:]
        return replace(self, previous=anchors if goes_on else None)
