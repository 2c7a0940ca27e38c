# SPDX-License-Identifier: Apache-2.0
"""What the descriptor is trained on: clips as they are and spoilt at random, and photos that a camera moves over.

Nothing in here is a clip that anything is chosen or reported by (`bench.common.material`). What spoils them is of the
same kinds as the conditions of `bench.selection`, with strengths and forms of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.selection.clips import sample

SEED = 26
LONG, SHORT = 32, 12
"""Units of a clip as it is, and of all other sequences."""


class Sequence(NamedTuple):
    """Frames of one scene.

    Attributes:
        name: What it was made of.
        real: Whether it is a clip as it is.
        frames: (T, H, W, 3) uint8 RGB.
    """

    name: str
    real: bool
    frames: np.ndarray


def of_clips(files: Mapping[str, Path], size: tuple[int, int]) -> Iterator[Sequence]:
    """Each clip as it is, and its beginning spoilt in two ways.

    Args:
        files: Clips by name.
        size: (height, width).
    """
    for number, (name, path) in enumerate(files.items()):
        rng = np.random.default_rng([SEED, number])
        frames = sample(path, size, LONG, 3.0)
        yield Sequence(name, True, frames)
        for spoil in rng.choice(list(SPOILT), 2, replace=False):
            yield Sequence(f"{name}, {spoil}", False, SPOILT[spoil](frames[:SHORT], rng))


def of_photos(files: Mapping[str, Path], size: tuple[int, int], count: int) -> Iterator[Sequence]:
    """Photos that a camera moves over, with pieces of other photos moving before them, most of them spoilt."""
    import cv2

    photos = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in files.values()]
    photos = [_at_most(photo, 1200) for photo in photos]
    for number in range(count):
        rng = np.random.default_rng([SEED, 1, number])
        frames = _camera(photos, size, rng)
        for _ in range(int(rng.integers(0, 4))):
            _piece(frames, photos[rng.integers(len(photos))], rng)
        spoil = rng.choice(["", *SPOILT], p=[0.3, *[0.7 / len(SPOILT)] * len(SPOILT)])
        yield Sequence(f"photo {number}, {spoil}", False, SPOILT[spoil](frames, rng) if spoil else frames)


def _camera(photos: list[np.ndarray], size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A camera that stands still, pans, zooms or both; or cuts to another photo."""
    way = rng.choice(["still", "pan", "zoom", "both", "cut"], p=[0.35, 0.25, 0.15, 0.1, 0.15])
    first, second = (photos[rng.integers(len(photos))] for _ in range(2))
    cut = int(rng.integers(2, SHORT - 1)) if way == "cut" else SHORT
    middle, share = rng.uniform(0.3, 0.7, 2), rng.uniform(0.4, 1.0)
    speed = rng.normal(0, 0.02, 2) if way in ("pan", "both") else np.zeros(2)
    growth = rng.normal(0, 0.03) if way in ("zoom", "both") else 0.0
    return np.stack([
        _view(first if t < cut else second, size, middle + speed * t, np.clip(share * (1 + growth * t), 0.25, 1))
        for t in range(SHORT)
    ])  # fmt: skip


def _view(photo: np.ndarray, size: tuple[int, int], middle: np.ndarray, share: float) -> np.ndarray:
    """What a camera sees of a photo that looks at `middle`, (x, y) as shares of it, and sees `share` of its width."""
    import cv2

    height, width = photo.shape[:2]
    across = share * min(width, height * size[1] / size[0])
    down = across * size[0] / size[1]
    left = float(np.clip(middle[0] * width, across / 2, width - across / 2)) - across / 2
    top = float(np.clip(middle[1] * height, down / 2, height - down / 2)) - down / 2
    step = across / size[1]
    matrix = np.array([[step, 0, left + (step - 1) / 2], [0, step, top + (step - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    # Bilinear sampling would skip pixels where the photo is larger than the view.
    photo = cv2.GaussianBlur(photo, (0, 0), 0.4 * step) if step > 1.5 else photo
    return cv2.warpAffine(photo, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _piece(frames: np.ndarray, photo: np.ndarray, rng: np.random.Generator) -> None:
    """Lets an oval piece of a photo pass over the frames, there only for a while."""
    import cv2

    side = int(rng.uniform(30, 140))
    top, left = (int(rng.integers(0, length - side)) for length in photo.shape[:2])
    piece = photo[top : top + side, left : left + side].astype(np.float32)
    oval = np.zeros((side, side), np.uint8)
    axes = (side // 2 - 1, int(side * rng.uniform(0.25, 0.48)))
    cv2.ellipse(oval, (side // 2, side // 2), axes, rng.uniform(0, 180), 0, 360, 255, -1)
    cover = cv2.GaussianBlur(oval, (0, 0), 1)[..., None].astype(np.float32) / 255
    height, width = frames.shape[1:3]
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    speed = rng.normal(0, 15), rng.normal(0, 8)
    for t in range(int(rng.integers(0, 6)), int(rng.integers(6, SHORT + 1))):
        at_x, at_y = round(x + speed[0] * t - side / 2), round(y + speed[1] * t - side / 2)
        x0, y0, x1, y1 = max(at_x, 0), max(at_y, 0), min(at_x + side, width), min(at_y + side, height)
        if x0 >= x1 or y0 >= y1:
            continue
        part = np.s_[y0 - at_y : y1 - at_y, x0 - at_x : x1 - at_x]
        behind = frames[t, y0:y1, x0:x1]
        frames[t, y0:y1, x0:x1] = _bytes(behind * (1 - cover[part]) + piece[part] * cover[part])


def _at_most(photo: np.ndarray, side: int) -> np.ndarray:
    import cv2

    scale = side / max(photo.shape[:2])
    return photo if scale >= 1 else cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _bytes(frames + rng.uniform(2, 10) * rng.standard_normal(frames.shape, dtype=np.float32))


def _drifting_gain(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gains = np.exp(np.cumsum(rng.normal(0, 0.06, len(frames))))
    return _lit(frames, gains / gains[0])


def _exposure_step(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gains = np.ones(len(frames))
    gains[rng.integers(1, len(frames)) :] = rng.uniform(0.6, 1.5)
    return _lit(frames, gains)


def _slow_light(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _lit(frames, np.linspace(1, rng.uniform(0.35, 1.8), len(frames)))


def _flicker(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _lit(frames, np.exp(rng.normal(0, rng.uniform(0.03, 0.15), len(frames))))


def _lit(frames: np.ndarray, gains: np.ndarray) -> np.ndarray:
    return _bytes(frames * gains.astype(np.float32)[:, None, None, None])


def _compressed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    import cv2

    quality = int(rng.integers(12, 40))
    coded = [cv2.imencode(".jpg", each, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for each in frames]
    return np.stack([cv2.imdecode(each, cv2.IMREAD_COLOR) for each in coded])


def _shake(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _moved(frames, rng.uniform(-3, 3, (len(frames), 2)), np.zeros(len(frames)))


def _pan(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    times = np.arange(len(frames)) - len(frames) / 2
    return _moved(frames, times[:, None] * rng.uniform((-5, -2), (5, 2)), times * rng.uniform(-0.01, 0.01))


def _moved(frames: np.ndarray, shifts: np.ndarray, growths: np.ndarray) -> np.ndarray:
    import cv2

    height, width = frames.shape[1:3]
    moved = []
    for frame, shift, growth in zip(frames, shifts, growths, strict=True):
        matrix = np.array(
            [[1 + growth, 0, shift[0] - growth * width / 2], [0, 1 + growth, shift[1] - growth * height / 2]]
        )
        moved.append(cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REFLECT))
    return np.stack(moved)


SPOILT: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "drifting gain": _drifting_gain,
    "exposure step": _exposure_step,
    "slow light": _slow_light,
    "flicker": _flicker,
    "compressed": _compressed,
    "shake": _shake,
    "pan": _pan,
}
"""What may happen to a sequence, by name: (T, H, W, 3) uint8 and a generator to the same."""
