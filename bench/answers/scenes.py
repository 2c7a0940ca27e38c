# SPDX-License-Identifier: Apache-2.0
"""Scenes of `bench.answers`: pieces of photos, tinted and cut to a shape, before a real clip or a photo.

They come, leave, move and change their colour; the camera may move behind them, and the light, noise or compression
spoil the whole picture. What can be seen in each unit is written down beside the frames, so that every question has
one right answer, in any part of a scene and played backwards too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.common import material
from bench.selection.clips import TOKEN, sample
from bench.selection.conditions import CONDITIONS, ROOM
from evs_vllm.testing import synthetic_clip

SEED = 31
COLOURS = {
    "red": (230, 30, 30), "yellow": (240, 220, 30), "green": (40, 190, 50), "blue": (40, 70, 235),
    "purple": (190, 50, 210), "white": (250, 250, 250),
}  # fmt: skip
"""RGB of a fully lit piece, by name."""
SHAPES = ("disc", "square", "triangle", "ring")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLAIN = "as it is"
CAMERAS = {PLAIN: 0.55, "shake": 0.1, "pan": 0.2, "zoom": 0.15}
"""How often the camera does what, for photos."""
STEADY = {PLAIN: 0.8, "shake": 0.05, "pan": 0.1, "zoom": 0.05}
"""The same for clips, in which something moves anyway."""
LIGHTS = {PLAIN: 0.4, "noise": 0.2, "h264": 0.1, "exposure steps": 0.1, "flicker": 0.1, "slow light": 0.1}
"""How often what spoils the picture."""
SOURCE_UNITS, SOURCE_FPS = 96, 3.0
"""Of a clip's file, at most so many frames are used."""


class Seen(NamedTuple):
    """One object as it is in one unit.

    Attributes:
        number: Which object of the scene.
        colour, shape: Names in `COLOURS` and `SHAPES`.
        x, y: Its middle, as shares of the frame's width and height.
    """

    number: int
    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        name: Tells it from the others of its use.
        kind: "clip" or "photo", what is behind the objects.
        camera, light: Names of conditions of `bench.selection`.
        frames: (T, H, W, 3) uint8 RGB, one frame a unit.
        seen: For each unit, the objects that are there.
        cut: The unit with which another scene begins, or None.
    """

    name: str
    kind: str
    camera: str
    light: str
    frames: np.ndarray
    seen: tuple[tuple[Seen, ...], ...]
    cut: int | None = None


def joined(first: Sequence[tuple[Seen, ...]], second: Sequence[tuple[Seen, ...]]) -> tuple[tuple[Seen, ...], ...]:
    """What is seen in a scene and then in another one, whose objects are others."""
    after = 1 + max((each.number for unit in first for each in unit), default=-1)
    return *first, *(tuple(each._replace(number=each.number + after) for each in unit) for unit in second)


class Maker:
    """Makes the scenes of one use. The same settings and number give the same scene.

    Args:
        use: "train", "choose" or "report" (`bench.common.material`), or "drawn": drawn clips, for the tests.
        grid: (rows, columns) of tokens.
        units: T.
        cuts: The share of scenes that are cut together from two.
    """

    def __init__(self, use: str, grid: tuple[int, int], units: int, cuts: float = 0.0) -> None:
        self.use, self.units, self.cuts = use, units, cuts
        self.size = grid[0] * TOKEN, grid[1] * TOKEN
        self.room = _larger(self.size)
        self.paths: dict[str, Path] = {}
        if use != "drawn":
            self.paths = material.files_of(material.CLIPS[use])
        self._clip = lru_cache(maxsize=None)(self._read_clip)

    @cached_property
    def photos(self) -> list[np.ndarray]:
        """(H, W, 3) uint8 RGB each, at most 1000 pixels along a side."""
        import cv2

        if self.use == "drawn":
            return list(synthetic_clip(3, self.room, "noise", seed=1))
        files = material.files_of(material.PHOTOS_FOR[self.use]).values()
        return [_at_most(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), 1000) for path in files]

    def make(self, number: int) -> Scene:
        """Scene `number` of this use."""
        rng = np.random.default_rng([SEED, sum(map(ord, self.use)), number])
        scene = self._single(f"{self.use} {number}", rng)
        if self.units < 6 or rng.random() >= self.cuts:
            return scene
        other, cut = self._single("", rng), int(rng.integers(3, self.units - 2))
        frames = np.concatenate([scene.frames[:cut], other.frames[cut:]])
        return replace(scene, frames=frames, seen=joined(scene.seen[:cut], other.seen[cut:]), cut=cut)

    def _single(self, name: str, rng: np.random.Generator) -> Scene:
        kind = str(rng.choice(["clip", "photo"]))
        camera, light = _one_of(STEADY if kind == "clip" else CAMERAS, rng), _one_of(LIGHTS, rng)
        large = _larger(self.room)
        behind = self._of_clip(large, rng) if kind == "clip" else self._of_photo(large, rng)
        move, spoil = CONDITIONS[camera], CONDITIONS[light]
        assert move is not None and spoil is not None
        # Twice as large as what is shown, once for the camera and once for the light.
        pictures = move(behind, rng)
        seen = self._put_objects(pictures, rng)
        return Scene(name, kind, camera, light, spoil(pictures, rng), seen)

    def _read_clip(self, name: str) -> np.ndarray:
        if self.use == "drawn":
            return synthetic_clip(self.units, _larger(self.room), moving=0.1, seed=len(name))
        return sample(self.paths[name], _larger(self.room), SOURCE_UNITS, SOURCE_FPS)

    def _of_clip(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Frames of a part of a clip, in a part of the picture; to and fro where it is too short."""
        frames = self._clip(str(rng.choice(sorted(self.paths) or ["one", "other"])))
        step = int(rng.integers(1, 1 + max(1, min(3, len(frames) // self.units))))
        start = int(rng.integers(0, 1 + max(0, len(frames) - step * self.units)))
        index = (start + step * np.arange(self.units)) % (2 * len(frames) - 1 - (len(frames) > 1))
        index = np.minimum(index, 2 * len(frames) - 2 - index) if len(frames) > 1 else index * 0
        share, mirrored = rng.uniform(0.7, 1.0), rng.random() < 0.5
        top, left = (round(rng.uniform(0, 1 - share) * length) for length in size)
        height, width = (round(share * length) for length in size)
        part = frames[index][:, top : top + height, left : left + width]
        return _resized(part[:, :, ::-1] if mirrored else part, size)

    def _of_photo(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A part of a photo, again and again."""
        photo = self.photos[rng.integers(len(self.photos))]
        side = int(rng.uniform(0.5, 1.0) * min(photo.shape[:2]))
        top, left = (int(rng.integers(0, 1 + length - side)) for length in photo.shape[:2])
        part = photo[top : top + side, left : left + side]
        view = _resized((part[:, ::-1] if rng.random() < 0.5 else part)[None], size)
        return np.repeat(view, self.units, axis=0)

    def _put_objects(self, pictures: np.ndarray, rng: np.random.Generator) -> tuple[tuple[Seen, ...], ...]:
        """Draws objects and pastes them into the pictures; what is seen of them in each unit."""
        count = int(rng.choice([0, 1, 2, 3], p=[0.05, 0.25, 0.4, 0.3]))
        colours = [str(each) for each in rng.permutation(list(COLOURS))]
        placed: list[list[Seen | None]] = []
        for _ in range(count):
            for _ in range(20):
                track = _track(len(placed), colours, str(rng.choice(SHAPES)), self.units, rng)
                if all(_apart(track, other) for other in placed):
                    placed.append(track)
                    colours = [each for each in colours if all(seen is None or seen.colour != each for seen in track)]
                    break
        for track in placed:
            _paste(pictures, track, self.photos[rng.integers(len(self.photos))], rng)
        return tuple(tuple(track[t] for track in placed if track[t] is not None) for t in range(self.units))  # type: ignore[misc]


def _track(number: int, colours: list[str], shape: str, units: int, rng: np.random.Generator) -> list[Seen | None]:
    """When, where and in which colours an object is there."""
    begin = 0 if rng.random() < 0.3 else int(rng.integers(1, max(2, units - 3)))
    end = units if rng.random() < 0.4 else int(rng.integers(min(units, begin + 3), units + 1))
    cell = rng.integers(0, 3, 2)
    to = cell.copy()
    if rng.random() < 0.4:
        axis = rng.integers(2)
        to[axis] = (cell[axis] + rng.integers(1, 3)) % 3
    moved_from = rng.uniform(begin, max(begin + 1, end - 3))
    moved_for = rng.uniform(2, max(3, end - moved_from))
    changed = int(rng.integers(begin + 1, end)) if end - begin >= 4 and rng.random() < 0.3 else units
    jitter = rng.uniform(-0.05, 0.05, 2)
    track: list[Seen | None] = [None] * units
    for t in range(begin, end):
        share = np.clip((t - moved_from) / moved_for, 0, 1)
        y, x = (cell + (to - cell) * share + 0.5) / 3 + jitter
        track[t] = Seen(number, colours[1] if t >= changed else colours[0], shape, float(x), float(y))
    return track


def _apart(one: list[Seen | None], other: list[Seen | None]) -> bool:
    """Whether two objects never cover each other by much."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a and b]
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) > 0.3 for a, b in both)


def _paste(pictures: np.ndarray, track: list[Seen | None], photo: np.ndarray, rng: np.random.Generator) -> None:
    """A piece of a photo, cut to a shape with soft edges, most of its own colours replaced by the named one."""
    import cv2

    height, width = pictures.shape[1:3]
    side = round(rng.uniform(0.24, 0.36) * min(height, width))
    taken = int(rng.uniform(0.15, 0.5) * min(photo.shape[:2]))
    top, left = (int(rng.integers(0, 1 + length - taken)) for length in photo.shape[:2])
    piece = _resized(photo[None, top : top + taken, left : left + taken], (side, side))[0].astype(np.float32)
    grey = piece.mean(-1, keepdims=True)
    light = 0.72 + 0.28 * np.clip((grey - grey.mean()) / (2 * grey.std() + 8), -1, 1)
    shape = next(each.shape for each in track if each)
    cover = cv2.GaussianBlur(_mask(shape, side, rng.uniform(-15, 15)), (0, 0), 1.2)[..., None].astype(np.float32) / 255
    for t, seen in enumerate(track):
        if seen is None:
            continue
        painted = 0.85 * light * np.array(COLOURS[seen.colour], np.float32) + 0.15 * piece
        x, y = round(seen.x * width - side / 2), round(seen.y * height - side / 2)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
        part = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
        behind = pictures[t, y0:y1, x0:x1]
        mixed = behind * (1 - cover[part]) + painted[part] * cover[part]
        pictures[t, y0:y1, x0:x1] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _mask(shape: str, side: int, degrees: float) -> np.ndarray:
    """(side, side) uint8, 255 within the shape."""
    import cv2

    mask, half = np.zeros((side, side), np.uint8), side / 2
    middle = (side // 2, side // 2)
    if shape in ("disc", "ring"):
        cv2.circle(mask, middle, side // 2 - 1, 255, -1)
        if shape == "ring":
            cv2.circle(mask, middle, side // 4, 0, -1)
        return mask
    corners = {"square": (45, 135, 225, 315), "triangle": (90, 210, 330)}[shape]
    angles = np.radians(np.array(corners) + degrees)
    points = np.stack([half + (half - 1) * np.cos(angles), half - (half - 1) * np.sin(angles)], axis=1)
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 255)
    return mask


def _one_of(weights: dict[str, float], rng: np.random.Generator) -> str:
    return str(rng.choice(list(weights), p=list(weights.values())))


def _larger(size: tuple[int, int]) -> tuple[int, int]:
    return round(ROOM * size[0]), round(ROOM * size[1])


def _resized(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    method = cv2.INTER_AREA if pictures.shape[1] >= size[0] else cv2.INTER_CUBIC
    return np.stack([cv2.resize(each, size[::-1], interpolation=method) for each in pictures])


def _at_most(photo: np.ndarray, side: int) -> np.ndarray:
    import cv2

    scale = side / max(photo.shape[:2])
    return photo if scale >= 1 else cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
