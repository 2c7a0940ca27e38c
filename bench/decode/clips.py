# SPDX-License-Identifier: Apache-2.0
"""Video files for the measurement of decoders: H.264 in mp4 at 30 frames a second, as the web has them.

What they show are real clips (`bench.common.material`, of those for reports), scaled up, five seconds of each in turns.
The same arguments give the same pictures; files are kept in the temporary directory.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np

from bench.common.clips import there_and_back

VERSION = 1
"""Raise it when the same arguments give other pictures than before."""

FPS = 30
TURN = 5 * FPS
"""So many frames of a source, then the next one, which is a cut."""

SOURCES = ("bigbuckbunny", "bikes")


@dataclass(frozen=True)
class FileSpec:
    """One file.

    Attributes:
        frames: How many.
        height: Of a frame, in pixels; even.
        width: Of a frame, in pixels; even.
        key_distance: Frames from a key frame to the next one; there are no others.
        b_frames: B-frames in a row at most; libx264's default is 3, cameras have none.
    """

    frames: int
    height: int
    width: int
    key_distance: int
    b_frames: int = 3

    @property
    def name(self) -> str:
        frames = "" if self.b_frames else ", no B-frames"
        return f"{self.frames / FPS:g} s of {self.width}x{self.height}, a key frame in {self.key_distance}{frames}"


def video_file(spec: FileSpec, folder: Path | None = None) -> Path:
    """The file, made on first use.

    Args:
        spec: Which one.
        folder: Where files are kept; by default a folder of this user's in the temporary directory.
    """
    import av

    folder = folder or Path(tempfile.gettempdir()) / f"evs-vllm-bench-{os.getuid()}" / "h264"
    key = hashlib.sha256(json.dumps([VERSION, av.__version__, cv2.__version__, asdict(spec)]).encode()).hexdigest()[:16]
    path = folder / f"{key}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        try:
            write_h264(pictures(spec), aside / path.name, spec)
            (aside / path.name).replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def write_h264(frames: Iterator[np.ndarray], path: Path, spec: FileSpec, **options: str) -> None:
    """Writes (height, width, 3) uint8 BGR frames by libx264 with its defaults, but for key frames and B-frames.

    Args:
        frames: What it shows.
        path: Of the new file; its ending says which container.
        spec: Its size, key frames and B-frames.
        options: More of libx264's.
    """
    import av

    distance = str(spec.key_distance)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width, stream.pix_fmt = spec.height, spec.width, "yuv420p"
        stream.options = {
            "g": distance, "keyint_min": distance, "sc_threshold": "0", "bf": str(spec.b_frames), "crf": "23", **options
        }  # fmt: skip
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))


def pictures(spec: FileSpec) -> Iterator[np.ndarray]:
    """What a file shows, uint8 BGR frames (height, width, 3)."""
    sources = [_source(name) for name in SOURCES]
    shown = [0] * len(sources)
    turns = cycle(range(len(sources)))
    which = next(turns)
    for number in range(spec.frames):
        if number and number % TURN == 0:
            which = next(turns)
        picture = sources[which][there_and_back(shown[which], len(sources[which]))]
        shown[which] += 1
        height, width = picture.shape[:2]
        scale = min(height / spec.height, width / spec.width)
        high, wide = round(spec.height * scale), round(spec.width * scale)
        top, left = (height - high) // 2, (width - wide) // 2
        cropped = picture[top : top + high, left : left + wide]
        yield cv2.resize(cropped, (spec.width, spec.height), interpolation=cv2.INTER_CUBIC)


def _source(name: str) -> list[np.ndarray]:
    from bench.common.clips import decode
    from evs_vllm.testing import real_clip_path

    return list(decode(real_clip_path(name)))
