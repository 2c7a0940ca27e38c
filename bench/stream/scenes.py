# SPDX-License-Identifier: Apache-2.0
"""What the cameras of `bench.stream` see, cut into chunks: one video file each, as a camera would send them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from bench.common import material
from bench.common.clips import FPS, there_and_back, write_video

VERSION = 1
"""Raise it when the same arguments give other pixels than before."""


def nothing_happens(count: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of a surveillance camera at night: it stands still, and its sensor has noise of 2 to 4 grey levels."""
    picture = _read("vtest", 1, size)[0].astype(np.float32)
    rng = np.random.default_rng(17)
    noise = np.sqrt(2 + 0.05 * picture) * rng.standard_normal((count, *picture.shape), dtype=np.float32)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def still_camera(count: int, size: tuple[int, int]) -> np.ndarray:
    """A surveillance camera above a street in which people walk."""
    return _read("vtest", count, size)


def hand_held(count: int, size: tuple[int, int]) -> np.ndarray:
    """An object that is turned in front of a camera in a hand."""
    return _read("cup", count, size)


def cuts(count: int, size: tuple[int, int]) -> np.ndarray:
    """A film trailer and a street, each with cuts of its own, in turns of 6 s."""
    films = [_read(name, count, size) for name in ("Megamind", "bikes")]
    each = int(6 * FPS)
    return np.stack([films[index // each % 2][index] for index in range(count)])


SCENES: dict[str, Callable[[int, tuple[int, int]], np.ndarray]] = {
    "nothing happens": nothing_happens,
    "still camera": still_camera,
    "hand-held": hand_held,
    "cuts": cuts,
}
"""By name: so many frames, `FPS` a second, of a height and a width to (F, height, width, 3) uint8 BGR."""


def _read(name: str, count: int, size: tuple[int, int]) -> np.ndarray:
    """`count` frames of a clip, `FPS` a second of its time; one that is too short goes forwards and backwards."""
    source = next(each for each in material.REPORT if each.name == name)
    capture = cv2.VideoCapture(str(material.files_of((source,))[name]))
    frames, step = [], (capture.get(cv2.CAP_PROP_FPS) or 25.0) / FPS
    index, wanted = 0, 0.0
    while len(frames) < count and capture.grab():
        if index >= wanted:
            frames.append(_cropped(capture.retrieve()[1], size))
            wanted += step
        index += 1
    capture.release()
    return np.stack([frames[there_and_back(number, len(frames))] for number in range(count)])


def _cropped(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a frame, as large as the shape of `size` allows, resized to it."""
    height, width = size
    scale = min(frame.shape[0] / height, frame.shape[1] / width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (frame.shape[0] - rows) // 2, (frame.shape[1] - columns) // 2
    return cv2.resize(frame[top : top + rows, left : left + columns], (width, height), interpolation=cv2.INTER_AREA)


def chunk_files(scene: str, seconds: int, frames: int, size: tuple[int, int], folder: Path | None = None) -> list[Path]:
    """A stream in chunks of so many frames, each an mp4 file of its own, made on first use.

    Args:
        scene: A name in `SCENES`.
        seconds: How long the stream is.
        frames: Of a chunk; what is left at the end is not sent.
        size: Height and width.
        folder: Where they are kept; by default a folder of this user's in the temporary directory.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"evs-vllm-bench-{os.getuid()}" / "streams"
    key = json.dumps([VERSION, cv2.__version__, scene, seconds, frames, size])
    home = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not home.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        try:
            pictures = SCENES[scene](int(seconds * FPS), size)
            for number in range(len(pictures) // frames):
                some = pictures[number * frames : (number + 1) * frames]
                write_video(some, aside / f"{number:03}.mp4", "mp4v", size)
            aside.replace(home)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return sorted(home.glob("*.mp4"))
