# SPDX-License-Identifier: Apache-2.0
"""The clips of `bench.selection`: read, sampled, put under a condition, cut together, and laid out as tokens."""

import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bench.common import material
from bench.common.fetch import MaterialError
from bench.common.pretrained_tower import PATCH
from bench.selection.conditions import CONDITIONS, ROOM
from bench.selection.settings import Settings
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.testing import synthetic_clip

SEED = 15
TOKEN = 2 * PATCH
"""Pixels along the side of a token: 2 x 2 patches."""
MIX, CUTS = "mix", "cuts"


class Library:
    """All clips of a run, under every condition. The same settings give the same pixels.

    Args:
        settings: Which clips, how many units, which grid.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.height, self.width = (TOKEN * tokens for tokens in settings.grid)
        self.paths: dict[str, Path] = {}
        if settings.clips == "drawn":
            self.single = ["drawn one", "drawn two"]
        else:
            self.paths = material.files_of(material.CLIPS[settings.clips])
            self.single = list(self.paths)
        # Of one condition, all clips: half a gigabyte at full size.
        self.frames = lru_cache(maxsize=2 * len(self.single))(self._frames)
        self.pictures = lru_cache(maxsize=len(self.single))(self._pictures)

    @property
    def names(self) -> list[str]:
        """The clips, and at the end the mix of all of them."""
        return [*self.single, MIX]

    def is_cut(self, name: str, condition: str) -> bool:
        """Whether all its frames are also those of other clips under some condition."""
        return name == MIX or condition == CUTS

    def _frames(self, name: str, condition: str) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB: one clip under one condition, or cut together from several."""
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), zlib.crc32(condition.encode())])
        if condition == CUTS:
            following = self.names[(self.names.index(name) + 1) % len(self.names)]
            pair = [self.frames(each, self.settings.conditions[0]) for each in (name, following)]
            return alternate(pair[0], pair[1], rng)
        if name == MIX:
            count = self.settings.units // len(self.single)
            return np.concatenate([middle(self.frames(each, condition), count) for each in self.single])
        apply = CONDITIONS[condition]
        assert apply is not None
        return apply(self.pictures(name), rng)

    def _pictures(self, name: str) -> np.ndarray:
        """What a condition is applied to: (T, ROOM * H, ROOM * W, 3) uint8 RGB."""
        size = round(ROOM * self.height), round(ROOM * self.width)
        if name in self.paths:
            return sample(self.paths[name], size, self.settings.units, self.settings.fps)
        return synthetic_clip(self.settings.units, size, moving=0.1, seed=self.single.index(name))


def sample(path: Path, size: tuple[int, int], units: int, fps: float) -> np.ndarray:
    """Frames of a file, evenly in time, from its start.

    Args:
        path: A video.
        size: (height, width) of what is returned; the middle of each frame that has this shape, resized.
        units: At most so many.
        fps: Frames a second, or more where the file would give less than 4/5 of `units` by it.

    Returns:
        (T, height, width, 3) uint8 RGB.
    """
    import cv2

    capture = cv2.VideoCapture(str(path))
    # Counted, as some files have times without a frame: what a file says of its length is in such times.
    count = sum(1 for _ in iter(capture.grab, False))
    seconds = capture.get(cv2.CAP_PROP_FRAME_COUNT) / max(1, capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    if not count:
        raise MaterialError(f"OpenCV reads no frame of {path}.")
    step = max(1, min(round(count / seconds / fps), count // math.ceil(0.8 * units)))
    capture, frames = cv2.VideoCapture(str(path)), []
    for index in range(min(count, units * step)):
        capture.grab()
        if index % step == 0:
            frames.append(cv2.cvtColor(_cropped(capture.retrieve()[1], size), cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def alternate(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cuts between two clips, every 3 to 8 units; each goes on where it was left. As many units as the first has."""
    cut: list[np.ndarray] = []
    places = [0, 0]
    while (left := len(first) - sum(places)) > 0:
        turn = len(cut) % 2
        piece = (first, second)[turn][places[turn] :][: min(left, int(rng.integers(3, 9)))]
        places[turn] += len(piece)
        cut.append(piece)
    return np.concatenate(cut)


def middle(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` units out of the middle."""
    start = (len(frames) - count) // 2
    return frames[start : start + count]


def as_clip(frames: np.ndarray) -> Clip:
    """(T, H, W, 3) uint8 as tokens: (T, P, 2352), each 2 x 2 patches of (channel, 14, 14), as in Qwen2-VL."""
    units, height, width, _ = frames.shape
    rows, columns = height // TOKEN, width // TOKEN
    cut = torch.from_numpy(frames).view(units, rows, 2, PATCH, columns, 2, PATCH, 3)
    tokens = cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(units, rows * columns, -1)
    return Clip(tokens.contiguous(), (units, rows, columns), TokenPixels(2, 3, 1, PATCH))


def _cropped(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, as large as the shape of `size` allows, resized to it."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(height / size[0], width / size[1])
    wanted = [round(scale * each) for each in size]
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    picture = picture[top : top + wanted[0], left : left + wanted[1]]
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, size[::-1], interpolation=method)
