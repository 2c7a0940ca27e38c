# SPDX-License-Identifier: Apache-2.0
"""Decodes of a video only what its sampled frames need, and gives the pixels that OpenCV gives. Needs PyAV, not vLLM.

OpenCV decodes every frame up to the last one that is sampled. Two things can be left out without changing a pixel:
frames that no other frame is predicted from, and what lies between a sampled frame and the key frame that the next one
is decoded from. Of a file where that is not certain nothing is decoded; `Unusual` says why.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

IDR = 5
"""The type of an H.264 NAL unit from which decoding can start whatever came before."""

MOST_THREADS = 16
"""As OpenCV's loader, which takes a thread for each CPU up to this."""


class Unusual(Exception):
    """A file that has to be decoded in the ordinary way, and why."""


class Source(NamedTuple):
    """What a file says of itself: its frames, how many of them are shown a second, and for how many seconds."""

    frames: int
    fps: float
    duration: float


@dataclass(frozen=True)
class Track:
    """The packets of a file, one for each frame, in the order in which they are decoded.

    Attributes:
        times: When each one is shown, in ticks; all different.
        starts: The positions of those from which decoding can start, in order.
        source: What the frames are sampled by.
    """

    times: Sequence[int]
    starts: Sequence[int]
    source: Source

    def needed(self, times: set[int]) -> bytearray:
        """Of each packet, in order, whether the decoder has to see it for the frames of these times: 1 or 0."""
        needed = bytearray(len(self.times))
        for position, time in enumerate(self.times):
            if time not in times:
                continue
            # Frames that come after a start but are shown before it lean on what came before it.
            place = bisect_right(self.starts, position) - 1
            while place >= 0 and self.times[self.starts[place]] > time:
                place -= 1
            if place < 0:
                raise Unusual("a frame is shown before the first key frame")
            start = self.starts[place]
            needed[start : position + 1] = b"\1" * (position + 1 - start)
        return needed


def decode_sampled(
    data: bytes, choose: Callable[[Source], Sequence[int]], threads: int, limit: Callable[[int, int], None]
) -> tuple[np.ndarray, Source, list[int]]:
    """Decodes the frames that are chosen.

    Args:
        data: A file of H.264 with 8 bits and 4:2:0 in an mp4 or mov container.
        choose: Gives the numbers of the frames, of 0 to ``frames - 1``.
        threads: FFmpeg's threads.
        limit: Raises if frames of this width and height are too large.

    Returns:
        Frames (n, height, width, 3) as uint8 RGB; the source; the sorted numbers of the n frames, each one once.

    Raises:
        Unusual: The file is another one, or something in it is broken.
    """
    import av

    try:
        with av.open(BytesIO(data)) as container:
            stream = _video_of(container)
            limit(stream.codec_context.width, stream.codec_context.height)
            track = _track_of(container, stream)
        numbers = sorted(set(choose(track.source)))
        order = sorted(track.times)
        wanted = {order[number]: place for place, number in enumerate(numbers)}
        needed = track.needed(set(wanted))
        with av.open(BytesIO(data)) as container:
            stream = _video_of(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            frames = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
            missing = set(wanted.values())
            for frame in _decoded(container, stream, needed, wanted.keys(), threads):
                if frame.pts in wanted:
                    place = wanted[frame.pts]
                    frames[place] = _rgb(frame)
                    missing.discard(place)
    except av.FFmpegError as error:
        raise Unusual(str(error)) from None
    if missing:
        raise Unusual(f"{len(missing)} frames were not decoded")
    return frames, track.source, numbers


def _video_of(container: Any) -> Any:
    """The one video stream.

    Raises:
        Unusual: There is none, or it is of a kind that is not decoded here.
    """
    if "mp4" not in container.format.name.split(","):
        raise Unusual(f"the container is {container.format.name}")
    if len(container.streams.video) != 1:
        raise Unusual(f"it has {len(container.streams.video)} video streams")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context.name != "h264" or context.pix_fmt != "yuv420p":
        raise Unusual(f"it is {context.name} in {context.pix_fmt}")
    if not (context.extradata and context.extradata[0] == 1):  # where NAL units have their length before them
        raise Unusual("its parameters are not in the header")
    return stream


def _track_of(container: Any, stream: Any) -> Track:
    """Reads all packets, decodes none."""
    length_bytes = (stream.codec_context.extradata[4] & 3) + 1
    times: list[int] = []
    starts: list[int] = []
    for packet in container.demux(stream):
        if packet.size == 0:  # the one that ends the stream
            continue
        if packet.pts is None or packet.is_corrupt or packet.is_discard:
            raise Unusual("a packet has no time, is broken or is not to be shown")
        if packet.is_keyframe and IDR in _unit_types(memoryview(packet), length_bytes):
            starts.append(len(times))
        times.append(packet.pts)
    if not times or stream.frames != len(times) or len(set(times)) != len(times):
        raise Unusual(f"the header counts {stream.frames} frames, there are {len(set(times))}")
    if stream.guessed_rate is None:
        raise Unusual("its frame rate is not known")
    fps = float(stream.guessed_rate)
    # vLLM takes the header's number unless the time of the last frame, in frames, is less by more than one.
    shown = int((max(times) - min(times)) * float(stream.time_base) * fps + 0.5) + 1
    if shown < len(times) - 1:
        raise Unusual("it has more frames than its frame rate says")
    return Track(times, starts, Source(len(times), fps, len(times) / fps))


def _unit_types(packet: memoryview, length_bytes: int) -> Iterator[int]:
    """The types of the NAL units of a packet."""
    place = 0
    while place + length_bytes < len(packet):
        size = int.from_bytes(packet[place : place + length_bytes], "big")
        place += length_bytes
        yield packet[place] & 31
        place += size


def _decoded(container: Any, stream: Any, needed: bytearray, wanted: Any, threads: int) -> Iterator[Any]:
    """Frames as the decoder gives them, the wanted ones among them.

    Raises:
        Unusual: Something was broken on the way, or frames are interlaced or turned.
    """
    context = stream.codec_context
    context.thread_count = threads
    context.thread_type = "FRAME" if threads > 1 else "SLICE"
    packets = (packet for packet in container.demux(stream) if packet.size)
    for packet, send in zip(packets, needed, strict=True):
        if send:
            # A frame that nothing is predicted from is left out unless it is wanted itself.
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from _whole(context.decode(packet))
    yield from _whole(context.decode(None))


def _whole(frames: Sequence[Any]) -> Sequence[Any]:
    for frame in frames:
        if frame.is_corrupt or frame.interlaced_frame or frame.rotation:
            raise Unusual("a frame is broken, interlaced or turned")
    return frames


def _rgb(frame: Any) -> np.ndarray:
    """As OpenCV converts it: by BT.601 whatever the file says, and bicubic."""
    return frame.to_ndarray(
        format="rgb24", src_colorspace="ITU601", dst_colorspace="ITU601", interpolation="BICUBIC", threads=1
    )
