# SPDX-License-Identifier: Apache-2.0
"""Frames to chunks, chunks to turns. Where they are cut depends on the clock alone, never on what was dropped."""

import base64
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evs_vllm.errors import EVSError
from evs_vllm.live.source import Frame

MIN_FRAMES = 2
"""Frames of the shortest chunk: vLLM answers 500 to a clip of one frame, and what moves needs two."""


@dataclass(frozen=True)
class Chunk:
    """A few seconds of video that never change any more.

    Attributes:
        start: Seconds of the stream at which it begins.
        stop: Seconds at which it ends.
        frames: Number of its frames.
        url: The frames as a ``data:`` URL, as vLLM takes a row of JPEGs.
    """

    start: float
    stop: float
    frames: int
    url: str


@dataclass(frozen=True)
class Turn:
    """What is new since the last question.

    Attributes:
        chunks: At least one chunk, in order.
        skipped: Frames that are in none of them, nor in an earlier turn's, because they were too few for a chunk.
    """

    chunks: tuple[Chunk, ...]
    skipped: int = 0

    @property
    def frames(self) -> int:
        return sum(chunk.frames for chunk in self.chunks)


class Chunker:
    """Cuts frames into turns of `every` seconds, and those into chunks of at most `chunk` seconds, about equal.

    A gap in the video or another picture size begins a chunk, too.

    Args:
        fps: Frames a second.
        chunk: Longest chunk, in seconds.
        every: Seconds from question to question; None is as long as a chunk.

    Raises:
        EVSError: That is less than `MIN_FRAMES` frames.
    """

    def __init__(self, fps: float, chunk: float, every: float | None = None) -> None:
        self._fps = fps
        longest = self._frames("--chunk", chunk)
        self.turn_frames = longest if every is None else self._frames("--every", every)
        # In pairs: some families make a unit of two frames, and a chunk with an odd one repeats it.
        pairs, count = self.turn_frames // 2, 1
        if self.turn_frames > longest:
            count = min(math.ceil(self.turn_frames / (longest // 2 * 2)), pairs)
        self.bounds = [*(2 * -(-i * pairs // count) for i in range(count)), self.turn_frames]
        """Where the chunks of a turn begin and end, in frames."""
        self._skipped = 0

    def turns(self, frames: Iterable[Frame]) -> Iterator[Turn]:
        """Yields each turn as soon as its last frame is there; at the end what is left."""
        pieces: list[list[Frame]] = []
        for frame in frames:
            number, place = divmod(frame.tick, self.turn_frames)
            last = pieces[-1][-1] if pieces else None
            if last is not None and last.tick // self.turn_frames != number:
                yield from self._turn(pieces)
                pieces, last = [], None
            if last is None or place in self.bounds or frame.tick != last.tick + 1 or frame.size != last.size:
                pieces.append([])
            pieces[-1].append(frame)
            if place == self.turn_frames - 1:
                yield from self._turn(pieces)
                pieces = []
        yield from self._turn(pieces)

    def _frames(self, name: str, seconds: float) -> int:
        frames = round(seconds * self._fps)
        if frames < MIN_FRAMES:
            raise EVSError(
                f"{name} got {seconds:g} s, which is {frames} frame(s) at --fps {self._fps:g}; allowed: at least "
                f"{MIN_FRAMES} frames. Give --fps or {name} more."
            )
        return frames

    def _turn(self, pieces: list[list[Frame]]) -> Iterator[Turn]:
        whole = [piece for piece in pieces if len(piece) >= MIN_FRAMES]
        self._skipped += sum(map(len, pieces)) - sum(map(len, whole))
        if whole:
            skipped, self._skipped = self._skipped, 0
            yield Turn(tuple(map(self._chunk, whole)), skipped)

    def _chunk(self, frames: list[Frame]) -> Chunk:
        start, stop = frames[0].tick / self._fps, (frames[-1].tick + 1) / self._fps
        url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame.jpeg).decode() for frame in frames)
        return Chunk(start, stop, len(frames), url)
