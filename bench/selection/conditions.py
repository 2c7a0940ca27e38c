# SPDX-License-Identifier: Apache-2.0
"""What may happen to a clip before it is sampled: noise, compression, light, a moving camera.

A condition takes pictures that are `ROOM` times as large as the frames it returns, so that a camera can move in them.
All are drawn from a seed: the same clip under the same condition has the same pixels again.
"""

import io
import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np

ROOM = 1.5

Condition = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(T, 1.5 H, 1.5 W, 3) uint8 RGB and a generator to (T, H, W, 3) uint8."""


def as_it_is(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The whole picture, made smaller."""
    import cv2

    width, height = _size(pictures)
    return np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_AREA) for each in pictures])


def noise(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sensor's noise: 3 grey levels of its own, and shot noise that grows with the light; 6.4 in mid-grey."""
    frames = as_it_is(pictures, rng).astype(np.float32)
    spread = np.sqrt(9 + 0.25 * frames)
    return _bytes(frames + spread * rng.standard_normal(frames.shape, dtype=np.float32))


def h264(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """H.264 at a low rate, 4:2:0, with a key frame every 8 units: the picture degrades in between and jumps at each."""
    import av

    frames = as_it_is(pictures, rng)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(4), options={
            "crf": "36", "g": "8", "keyint_min": "8", "sc_threshold": "0", "bf": "0", "threads": "1",
        })  # fmt: skip
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for each in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as container:
        return np.stack([each.to_ndarray(format="rgb24") for each in container.decode(video=0)])


def exposure_steps(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A camera that sets its exposure anew every 5 to 9 units, by up to two thirds of a stop either way."""
    ends = itertools.accumulate(rng.integers(5, 10, len(pictures)))
    gains = 2 ** rng.uniform(-2 / 3, 2 / 3, len(pictures) + 1)
    number = np.searchsorted(list(ends), np.arange(len(pictures)), side="right")
    return _lit(pictures, rng, np.where(number == 0, 1.0, gains[number]))


def flicker(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lamps that flicker: every unit up to 15 % brighter or darker."""
    return _lit(pictures, rng, rng.uniform(0.85, 1.15, len(pictures)))


def slow_light(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dusk: over the clip, down to a fifth of the light, more of the blue than of the red staying."""
    left = np.linspace(0, 1, len(pictures))[:, None]
    return _lit(pictures, rng, 0.2 ** (left * np.array([1.15, 1.0, 0.85])))


def shake(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A camera in a hand: every unit 1 to 3 pixels off, in any direction."""
    angle, far = rng.uniform(0, 2 * np.pi, len(pictures)), rng.uniform(1, 3, len(pictures))
    return _window(pictures, np.full(len(pictures), 1.03), np.stack([far * np.cos(angle), far * np.sin(angle)], 1))


def pan(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A camera that turns, 6 pixels a unit, to one side and back, over a fifth of the picture."""
    width, _ = _size(pictures)
    reach, zoom = 0.1 * width, 1.25
    path = (rng.uniform(0, 4 * reach) + 6 * np.arange(len(pictures))) % (4 * reach)
    across = np.abs(path - 2 * reach) - reach
    return _window(pictures, np.full(len(pictures), zoom), np.stack([across, 0 * across], 1))


def zoom(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A camera that zooms in over the clip, by half."""
    return _window(pictures, ROOM ** np.linspace(0, 1, len(pictures)), np.zeros((len(pictures), 2)))


CONDITIONS: dict[str, Condition | None] = {
    "as it is": as_it_is,
    "noise": noise,
    "h264": h264,
    "exposure steps": exposure_steps,
    "flicker": flicker,
    "slow light": slow_light,
    "shake": shake,
    "pan": pan,
    "zoom": zoom,
    "cuts": None,
}
"""By name. Cuts are made of several clips (`bench.selection.clips`)."""


def _size(pictures: np.ndarray) -> tuple[int, int]:
    """(width, height) of the frames."""
    return round(pictures.shape[2] / ROOM), round(pictures.shape[1] / ROOM)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _lit(pictures: np.ndarray, rng: np.random.Generator, gains: np.ndarray) -> np.ndarray:
    """Frames in other light: `gains` is (T,) or, by colour, (T, 3), of the light, not of its code."""
    gains = np.broadcast_to(gains.reshape(len(pictures), 1, 1, -1), (len(pictures), 1, 1, 3))
    # Codes are about the 2.2nd root of the light.
    return _bytes(as_it_is(pictures, rng) * gains.astype(np.float32) ** (1 / 2.2))


def _window(pictures: np.ndarray, zooms: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """What a camera sees that is zoomed in by `zooms` (T,) >= 1, and off by `shifts` (T, 2), (x, y) in pixels."""
    import cv2

    width, height = _size(pictures)
    frames = []
    for picture, zoom, shift in zip(pictures, zooms, shifts, strict=True):
        step = ROOM / zoom
        # Pixel centres: the middle of the frame, moved by the shift, lies in the middle of the picture.
        middle = np.array([picture.shape[1] - 1, picture.shape[0] - 1]) / 2
        start = middle + step * (shift - np.array([width - 1, height - 1]) / 2)
        matrix = np.array([[step, 0, start[0]], [0, step, start[1]]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpAffine(picture, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(frames)
