# SPDX-License-Identifier: Apache-2.0
"""Distinct video files for load: cuts of real clips, and drawn clips of which a known share moves.

The same arguments give the same file; files are kept in the temporary directory. A clip's number decides its source,
place in time, crop, mirroring and brightness, so no two numbers give the same clip and no cache can help a server.

    python -m bench.common.clips out/clips --count 8 --frames 32

writes clips, and beside them ``sharegpt.json``, which ``vllm bench serve --dataset-name sharegpt`` reads.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

VERSION = 1
"""Raise it when the same arguments give other pixels than before."""

SOURCES = ("bikes", "bigbuckbunny", "carphone_pristine")
TOKEN = 28
"""Pixels along the side of one token of the Qwen-VL families."""

QUESTION = "Describe the video in one sentence."

FPS = 2.0
"""What the processors of the Qwen-VL families sample at: they take every frame of such a file."""


@dataclass(frozen=True)
class ClipSpec:
    """One clip.

    Attributes:
        number: which of the distinct clips.
        frames: how many frames.
        height: of a frame, in pixels; even.
        width: of a frame, in pixels; even.
        moving: share of the tokens that change in every frame, all others stay as they are to the last bit; None is a
            cut of a real video.
    """

    number: int
    frames: int
    height: int
    width: int
    moving: float | None = None


def clip_file(spec: ClipSpec, folder: Path | None = None) -> Path:
    """The clip as an mp4 file, made on first use.

    Args:
        spec: which clip.
        folder: where files are kept; by default a folder of this user's in the temporary directory.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"evs-vllm-bench-{os.getuid()}" / "clips"
    key = hashlib.sha256(json.dumps([VERSION, cv2.__version__, asdict(spec)]).encode()).hexdigest()[:16]
    path = folder / f"{key}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        try:
            # Real clips are compressed like any camera's. Drawn ones must stay exact: the noise of a lossy codec would
            # change every token.
            codec = "mp4v" if spec.moving is None else "FFV1"
            write_video(frames_of(spec), aside / path.name, codec, (spec.height, spec.width))
            (aside / path.name).replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def main() -> None:
    """Writes clips for a tool of another's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8, help="how many distinct clips (default: 8)")
    parser.add_argument("--frames", type=int, default=32, help="of each clip (default: 32)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[336, 640])
    parser.add_argument("--moving", type=float, help="drawn clips of which this share moves, instead of real ones")
    args = parser.parse_args()
    entries = []
    for number in range(args.count):
        made = clip_file(ClipSpec(number, args.frames, *args.size, args.moving))
        path = args.folder.resolve() / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, path)
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Two people ride their bikes."}]
        entries.append({"conversations": turns, "video": str(path)})
    (args.folder / "sharegpt.json").write_text(json.dumps(entries, indent=1) + "\n")


def frames_of(spec: ClipSpec) -> Iterator[np.ndarray]:
    """The pixels of a clip, frame by frame: uint8, BGR."""
    return _cut(spec) if spec.moving is None else _drawn(spec)


def decode(path: Path) -> np.ndarray:
    """All frames of a file, uint8, BGR."""
    return np.stack(list(_read(cv2.VideoCapture(str(path)))))


def changed_tokens(frames: np.ndarray) -> float:
    """Share of the tokens of all units but the first that differ from the unit before (2 frames are a unit)."""
    units = frames[: len(frames) // 2 * 2].astype(np.int16)
    difference = np.abs(units[2:] - units[:-2]).max(axis=3)
    count, height, width = difference.shape
    cells = difference.reshape(count // 2, 2, height // TOKEN, TOKEN, width // TOKEN, TOKEN).max(axis=(1, 3, 5))
    return float((cells > 0).mean())


def _cut(spec: ClipSpec) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([VERSION, spec.number])
    source = SOURCES[spec.number % len(SOURCES)]
    length, height, width = _size_of(source)
    step = int(rng.integers(1, max(1, min(2, length // spec.frames)) + 1))
    start = int(rng.integers(0, max(0, length - spec.frames * step) + 1))
    zoom = rng.uniform(0.75, 1.0)
    crop_h = min(height, width * spec.height / spec.width) * zoom
    crop_w = crop_h * spec.width / spec.height
    top, left = (round(rng.uniform(0, room)) for room in (height - crop_h, width - crop_w))
    mirrored, brightness = bool(rng.integers(2)), int(rng.integers(-16, 17))
    window = np.s_[top : top + round(crop_h), left : left + round(crop_w)]

    def shaped(frame: np.ndarray) -> np.ndarray:
        small = cv2.resize(frame[window], (spec.width, spec.height), interpolation=cv2.INTER_AREA)
        return cv2.convertScaleAbs(small[:, ::-1] if mirrored else small, alpha=1.0, beta=brightness)

    # Too short a source plays forwards and backwards in turns, which has no jump. Cut first, so little is held.
    wanted = [there_and_back(start + index * step, length) for index in range(spec.frames)]
    from evs_vllm.testing import real_clip_path

    capture = cv2.VideoCapture(str(real_clip_path(source)))
    pictures = {index: shaped(frame) for index, frame in enumerate(_read(capture, max(wanted) + 1)) if index in wanted}
    return (pictures[index] for index in wanted)


def there_and_back(index: int, length: int) -> int:
    """Which frame of `length` stands at an index of a video that plays them forwards and backwards in turns."""
    if length == 1:
        return 0
    place = index % (2 * length - 2)
    return place if place < length else 2 * length - 2 - place


def _drawn(spec: ClipSpec) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([VERSION, spec.number, 1])
    rows, columns = spec.height // TOKEN, spec.width // TOKEN
    # A band of neighbouring tokens that starts at a random place and wraps around.
    count = round((spec.moving or 0) * rows * columns)
    place = (np.arange(rows * columns) - int(rng.integers(rows * columns))) % (rows * columns)
    cells = (place < count).reshape(rows, columns)
    mask = np.zeros((spec.height, spec.width, 1), dtype=bool)
    mask[: rows * TOKEN, : columns * TOKEN] = np.kron(cells, np.ones((TOKEN, TOKEN), dtype=bool))[..., None]
    coarse = rng.integers(0, 256, (math.ceil(spec.height / 7), math.ceil(spec.width / 7), 3), dtype=np.uint8)
    still = np.kron(coarse, np.ones((7, 7, 1), dtype=np.uint8))[: spec.height, : spec.width]
    for frame in range(spec.frames):
        # 5 and 3 pixels a frame over a texture of 7-pixel squares: every token is new in every frame.
        yield np.where(mask, np.roll(still, (5 * frame, 3 * frame), axis=(0, 1)), still)


@cache
def _size_of(source: str) -> tuple[int, int, int]:
    from evs_vllm.testing import real_clip_path

    capture = cv2.VideoCapture(str(real_clip_path(source)))
    try:
        properties = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
        length, height, width = (int(capture.get(name)) for name in properties)
        return length, height, width
    finally:
        capture.release()


def _read(capture: cv2.VideoCapture, limit: int | None = None) -> Iterator[np.ndarray]:
    try:
        count = 0
        while limit is None or count < limit:
            there, frame = capture.read()
            if not there:
                return
            count += 1
            yield frame
    finally:
        capture.release()


def write_video(frames: Iterable[np.ndarray], path: Path, codec: str, size: tuple[int, int]) -> None:
    """Writes (height, width, 3) uint8 BGR frames of that size, `FPS` a second.

    Raises:
        RuntimeError: OpenCV does not have the codec.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), FPS, (size[1], size[0]))
    if not writer.isOpened():
        raise RuntimeError(f"this OpenCV cannot write {codec}")
    try:
        for frame in frames:
            writer.write(np.ascontiguousarray(frame))
    finally:
        writer.release()


if __name__ == "__main__":
    main()
