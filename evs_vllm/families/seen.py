# SPDX-License-Identifier: Apache-2.0
"""A video as its processor got it, and the pixels that the processor would have made of it: of some tokens, or of all.

`evs_vllm.families.front_end` notes videos so. Pixels are the processor's bit for bit, whatever type they get after it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

import evs_kernels
from evs_vllm.core.clip import Source


@dataclass(frozen=True)
class Seen(ABC):
    """A video as its processor got it.

    Attributes:
        source: Its frames, or None if they are no uint8 pixels of three colours.
        why_stock: Why the processor made the pixels itself, or "" if it left them to `rows`.
        levels: What each of the 256 values of the three colours becomes, (3, 256); None where values stay as they are.
    """

    source: Source | None
    why_stock: str
    levels: torch.Tensor | None

    @abstractmethod
    def blank(self, dtype: torch.dtype) -> torch.Tensor:
        """The pixels of all tokens without data."""

    @abstractmethod
    def rows(self, tokens: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor:
        """The pixels of some tokens, bit for bit those of the processor.

        Args:
            tokens: (K,) sorted flat indices ``t*P + p``; None for all.
            dtype: That of the pixels.

        Returns:
            What stands for these tokens in the field of pixels, on the device of the frames.
        """


@dataclass(frozen=True)
class SeenRows(Seen):
    """A video of which a processor makes patch rows in the order of Qwen2-VL: (patches, values of a patch).

    Attributes:
        grid: (T, rows, columns) in patches.
        patch, merge: Pixels along a side of a patch, patches along a side of a token.
    """

    grid: tuple[int, int, int]
    patch: int
    merge: int

    def blank(self, dtype: torch.dtype) -> torch.Tensor:
        assert self.source is not None
        values = 3 * self.source.unit_frames * self.patch**2
        return torch.empty(int(np.prod(self.grid)), values, dtype=dtype, device="meta")

    def rows(self, tokens: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor:
        source = self.source
        assert source is not None
        _, height, width = self.grid
        pixels = evs_kernels.resize_patches(
            source.frames,
            height * self.patch,
            width * self.patch,
            None if tokens is None else torch.from_numpy(np.ascontiguousarray(tokens)),
            self.merge,
            self.patch,
            unit_frames=source.unit_frames,
        )
        rows = pixels.view(len(pixels) * self.merge**2, -1)
        if self.levels is None or not len(rows):
            return rows if self.levels is None else rows.to(dtype)
        # Of every colour the frames of a unit follow each other.
        levels = self.levels.to(rows.device, dtype).repeat_interleave(source.unit_frames, dim=0)
        return evs_kernels.place_blocks(rows, levels, 1, 1).view(rows.shape)


@dataclass(frozen=True)
class Squares:
    """The square frames that a model's vision tower takes, cut into blocks.

    Attributes:
        across: Blocks along a side. A block is a token, where some tokens may be wanted without the others.
        side: Pixels along a side of a block.
    """

    across: int
    side: int

    @property
    def pixels(self) -> int:
        """Pixels along a side of a frame."""
        return self.across * self.side


@dataclass(frozen=True)
class SeenFrames(Seen):
    """A video of which a processor makes whole frames, squashed to a square: (frames, 3, pixels, pixels).

    The blocks of some tokens are packed into as few frames as hold them, one after the other, row by row; what the last
    frame lacks is 0.

    Attributes:
        squares: What the frames become.
        arithmetic: Whose integers resize: see `evs_kernels.resize_patches`.
    """

    squares: Squares
    arithmetic: str

    def blank(self, dtype: torch.dtype) -> torch.Tensor:
        assert self.source is not None
        side = self.squares.pixels
        return torch.empty(len(self.source.frames), 3, side, side, dtype=dtype, device="meta")

    def rows(self, tokens: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor:
        source, across = self.source, self.squares.across
        assert source is not None and self.levels is not None
        device, side = source.frames.device, self.squares.pixels
        levels = self.levels.to(device, dtype)
        if tokens is None:
            tokens = np.arange(len(source.frames) * across**2)
        out = _empty((-(-len(tokens) // across**2), 3, side, side), dtype, device)
        # A frame a thread at a time, so that bytes are still in a core's cache when they become levels.
        at_once = torch.get_num_threads() if device.type == "cpu" else max(1, len(out))
        for first in range(0, len(out), at_once):
            some = tokens[first * across**2 : (first + at_once) * across**2]
            blocks = evs_kernels.resize_patches(
                source.frames,
                side,
                side,
                torch.from_numpy(np.ascontiguousarray(some)),
                1,
                self.squares.side,
                unit_frames=1,
                arithmetic=self.arithmetic,
            )
            evs_kernels.place_blocks(blocks, levels, across, across, out=out[first : first + at_once])
        return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As torch.empty, but on the CPU numpy's memory, which asks Linux for huge pages: the first touch of 100 MB takes
    7 ms, not 40."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
