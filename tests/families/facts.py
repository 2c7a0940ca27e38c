# SPDX-License-Identifier: Apache-2.0
"""What a module of this folder says about its families: how to write a tiny one, what it is compared with, facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from importlib import import_module
from types import MappingProxyType
from typing import Any

from evs_vllm.testing import TinyFamily


class Engine(IntEnum):
    """Which tests a family runs that start an engine, which takes half a minute."""

    NONE = 0
    """None: another family has the same model."""
    SOME = 1
    """Those for every family."""
    MOST = 2
    """Also those that text between the units of a clip could break."""
    ALL = 3
    """Every test that takes a `family`."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What tests have to know about a tiny model of a family, beyond what its folder says."""

    frame_size: tuple[int, int]
    """Height and width in pixels of a frame that reaches the model without resizing."""
    grid: tuple[int, int]
    """Rows and columns of tokens of such a frame."""
    engine: Engine = Engine.SOME
    whole_frames: bool = False
    """Whether its processor gives whole frames, one a unit, and its language model has 1-D RoPE.

    Otherwise rows of patches as Qwen2-VL's, two frames a unit, and M-RoPE.
    """
    makes_frames: bool = False
    """Whether this package makes its whole frames, squashed to squares, without its processor."""
    tokens_under: Callable[[int], Sequence[int]] | None = None
    """Along one side of a frame, the tokens whose pixels hold a given one, where tokens do not lie side by side."""
    ids_per_second: int | None = None
    """Position IDs per second of a clip, or None where they count units."""
    frames_past_256: int = 0
    """Frames of a clip, at 1.6 a second, of which position IDs exceed 256; for families that run most engine tests."""
    fewest_frames: int = 1
    """Its video processor refuses a clip of fewer frames."""
    long: int = 15
    """Frames of a clip that takes several steps to prefill, for families with whole frames."""
    extra_rows: int = 0
    """Embedding rows of a clip that are no tokens: a newline, indicators."""
    raw_pixels: bool = True
    """Whether vLLM has its tower normalise pixels, so that uint8 ones reach us; for families with rows of patches."""
    embeds_with: Mapping[str, Any] | None = None
    """What vLLM wants beside precomputed embeddings of a clip of two units, or None where it takes none."""
    audio: bool = False
    """Whether it also takes audio."""
    fps_argument: bool = False
    """Whether a request tells its processor the rate of frames as ``fps``, because it reads no metadata."""
    rotary: frozenset[str] = frozenset()
    """vLLM's classes of rotary embeddings in its language model, for families with whole frames."""
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({"image": 4, "video": 4}))
    """``limit_mm_per_prompt`` of its engines, as far as vLLM allows."""
    block_size: int = 32
    """Tokens that a prefix-cache hit is a multiple of."""
    step_tokens: int = 64
    """Tokens of a step in which a clip of `long` frames is prefilled in pieces."""
    remote_code: bool = False
    """Whether its config is code in its folder."""

    @property
    def unit_frames(self) -> int:
        """Frames in a unit."""
        return 1 if self.whole_frames else 2

    @property
    def per_unit(self) -> int:
        """Tokens of a unit of such frames."""
        return self.grid[0] * self.grid[1]

    @property
    def token_side(self) -> int:
        """Side of a token in pixels."""
        return self.frame_size[0] // self.grid[0]

    @property
    def one_clip(self) -> bool:
        """Whether vLLM allows one clip in a prompt."""
        return self.limits["video"] == 1

    @property
    def images(self) -> bool:
        """Whether vLLM allows images in a prompt."""
        return "image" in self.limits


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """One row of the tests' table of families."""

    tiny: TinyFamily
    reference: str
    """"module:Class" of the independent reference that its answers are compared with."""
    facts: Facts

    def load_reference(self) -> Any:
        """The class, which takes a model's folder. Imported on first use: references import torch."""
        module, name = self.reference.split(":")
        return getattr(import_module(module), name)
