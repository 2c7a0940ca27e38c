# SPDX-License-Identifier: Apache-2.0
"""Frames of a camera, a network stream or a file, at even distances in time, through OpenCV."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evs_vllm.errors import EVSError
from evs_vllm.live import INSTALL

JPEG_QUALITY = 90
OPEN_TIMEOUT_MS = READ_TIMEOUT_MS = 10_000
"""How long OpenCV may wait for a network stream before it counts as lost."""

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 15.0
LONGEST_HOLD_S = 1.0
"""A frame stands for at most this long where the source has no later one; what is missing beyond is a gap."""


class Source(NamedTuple):
    """Where the video comes from.

    Attributes:
        name: As the user wrote it.
        target: What OpenCV opens: a path, a URL or the number of a camera.
        is_file: Whether it is a local file.
    """

    name: str
    target: str | int
    is_file: bool


class Frame(NamedTuple):
    """One frame, encoded.

    Attributes:
        tick: Its number in an even row: it shows the source at ``tick / fps`` seconds.
        size: (height, width) in pixels.
        jpeg: Its bytes.
    """

    tick: int
    size: tuple[int, int]
    jpeg: bytes


class Capture(Protocol):
    """What is used of ``cv2.VideoCapture``."""

    def grab(self) -> bool: ...
    def retrieve(self) -> tuple[bool, Any]: ...
    def get(self, prop: int) -> float: ...
    def release(self) -> None: ...


class Stop(Protocol):
    """What is used of ``threading.Event``: set when no more frames are wanted."""

    def is_set(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...


class Player:
    """Plays a source: iterate over it once to get its `Frame`s.

    A camera or a network stream is read as fast as it delivers; its time is that of this machine. A file, here or
    behind a URL, has times of its own; it is played at its own speed, or as fast as it is read with `fast`.

    Args:
        source: From `parse_source`.
        fps: Frames a second to take. A source with fewer has frames that stand for several.
        stop: Ends the iteration.
        say: Called with a sentence for the user: the source is lost, or back.
        patience_s: How long a source that is lost may stay away.
        fast: Does not wait between the frames of a file.
        max_side: Frames with a longer side are made smaller before they are encoded.
        opener: Opens the target; for tests.
        clock: Seconds on this machine; for tests.
    """

    def __init__(
        self,
        source: Source,
        fps: float,
        stop: Stop,
        say: Callable[[str], None],
        patience_s: float = 300.0,
        fast: bool = False,
        max_side: int | None = None,
        opener: Callable[[str | int], Capture | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._fps, self._stop, self._say = source, fps, stop, say
        self._patience_s, self._fast, self._max_side = patience_s, fast, max_side
        self._opener, self._clock = opener or open_capture, clock
        self._due = 0  # the next tick

    def __iter__(self) -> Iterator[Frame]:
        """Yields frames until the source ends or `stop` is set.

        Raises:
            EVSError: The source cannot be opened, or stays away too long.
        """
        capture = self._opener(self._source.target)
        if capture is None:
            raise EVSError(f"cannot open {self._source.name}: OpenCV finds no such camera, stream or video file.")
        try:
            if self._source.is_file or _has_an_end(capture):
                yield from self._play(capture)
            else:
                started = self._clock()
                while capture is not None:
                    yield from self._watch(capture, started)
                    capture.release()
                    capture = None if self._stop.is_set() else self._open_again(started)
        finally:
            if capture is not None:
                capture.release()

    def _play(self, capture: Capture) -> Iterator[Frame]:
        """The frames of a file, by its own times."""
        import cv2

        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        started, first, number = self._clock(), None, 0
        while not self._stop.is_set() and capture.grab():
            position = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            first = position if first is None else first
            # Some containers have no times; their frames are as far apart as they say.
            seconds = position - first if position > first else number / rate
            number += 1
            if not self._fast and self._stop.wait(max(0.0, started + seconds - self._clock())):
                return
            yield from self._take(capture, seconds)

    def _watch(self, capture: Capture, started: float) -> Iterator[Frame]:
        """The frames of a camera or a stream until it breaks."""
        while not self._stop.is_set() and capture.grab():
            yield from self._take(capture, self._clock() - started)

    def _take(self, capture: Capture, seconds: float) -> Iterator[Frame]:
        """The frame that was just grabbed, once for every tick that is due."""
        tick = int(seconds * self._fps + 1e-6)
        if tick < self._due:
            return
        retrieved, pixels = capture.retrieve()
        if not retrieved:
            return
        if (tick - self._due) / self._fps > max(LONGEST_HOLD_S, 1 / self._fps):
            self._due = tick
        size, jpeg = _encode(pixels, self._max_side)
        for number in range(self._due, tick + 1):
            yield Frame(number, size, jpeg)
        self._due = tick + 1

    def _open_again(self, started: float) -> Capture | None:
        """The source once it delivers again, or None if it is not wanted any more."""
        lost, delay = self._clock(), FIRST_BACK_OFF_S
        self._say(f"{self._source.name} is lost after {lost - started:.1f} s of video; trying to open it again")
        while not self._stop.wait(delay):
            capture = self._opener(self._source.target)
            if capture is not None:
                if capture.grab():  # some open and deliver nothing
                    self._say(f"{self._source.name} is back after {self._clock() - lost:.1f} s")
                    return capture
                capture.release()
            away = self._clock() - lost
            if away > self._patience_s:
                raise EVSError(f"{self._source.name} is lost, and did not come back within {self._patience_s:g} s.")
            delay = min(2 * delay, LONGEST_BACK_OFF_S)
        return None


def parse_source(text: str) -> Source:
    """What a user means by SOURCE: the number of a camera, a URL, or a file.

    Raises:
        EVSError: No such file.
    """
    if text.isdecimal():
        return Source(f"camera {text}", int(text), False)
    if "://" in text:
        return Source(text, text, False)
    if not Path(text).is_file():
        raise EVSError(
            f"no such video file: {text}; a camera is a number (0), a stream a URL (rtsp://..., http://...)."
        )
    return Source(Path(text).name, text, True)


def check_opencv() -> None:
    """Refuses to begin without OpenCV.

    Raises:
        EVSError: It is not installed.
    """
    try:
        import cv2  # noqa: F401
    except ImportError:
        raise EVSError(f"live video needs OpenCV, which is not installed: {INSTALL}") from None


def open_capture(target: str | int) -> Capture | None:
    """OpenCV's capture of a path, a URL or a camera, or None where there is none."""
    import cv2

    # What does not open, we report. And FFmpeg has a line for every packet that a network loses.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if isinstance(target, str) and "://" in target:
        timeouts = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS),
        ]
        capture = cv2.VideoCapture(target, cv2.CAP_FFMPEG, timeouts)
    else:
        capture = cv2.VideoCapture(target)
    if not capture.isOpened():
        capture.release()
        return None
    if isinstance(target, int):
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # old frames are of no use
    return capture


def _has_an_end(capture: Capture) -> bool:
    """Whether this is a file behind a URL; a live stream has no number of frames."""
    import cv2

    return capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0


def _encode(pixels: Any, max_side: int | None) -> tuple[tuple[int, int], bytes]:
    """(height, width, 3) uint8 BGR as (its size, JPEG bytes)."""
    import cv2

    height, width = pixels.shape[:2]
    if max_side is not None and max(height, width) > max_side:
        scale = max_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded, jpeg = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    if not encoded:
        raise EVSError(f"OpenCV cannot encode a frame of {height}x{width} pixels as JPEG.")
    return (height, width), jpeg.tobytes()
