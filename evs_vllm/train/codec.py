# SPDX-License-Identifier: Apache-2.0
"""Frames <-> H.264 in an MP4 container, by PyAV (extra ``train``): drawn clips as a user would send them."""

from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from evs_vllm.errors import EVSError


def to_mp4(frames: np.ndarray, fps: float = 2, crf: int = 23) -> bytes:
    """Encodes frames; the same input gives the same bytes.

    Args:
        frames: (F, H, W, 3) uint8 RGB, H and W even.
        fps: Frames per second.
        crf: Constant rate factor of x264: 0 is lossless, 23 its default, 51 the worst.

    Returns:
        The content of an MP4 file.

    Raises:
        EVSError: PyAV is not installed, or a side is odd.
    """
    av, VideoReformatter = _av()
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise EVSError(f"H.264 needs an even height and width, got {height} x {width}.")
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        # In frames as small as ours x264's assembly reads memory that nobody wrote: other bytes a few times in 100.
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "asm=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        reformatter = VideoReformatter()  # one for all frames: setting it up takes longer than a small frame
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(reformatter.reformat(picture, format="yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()


def through_h264(frames: np.ndarray, crf: int = 23) -> np.ndarray:
    """What a server sees of frames that were sent as H.264: `to_mp4`, decoded; (F, H, W, 3) uint8.

    Raises:
        EVSError: As `to_mp4`.
    """
    av, VideoReformatter = _av()
    with av.open(BytesIO(to_mp4(frames, crf=crf))) as container:
        container.streams.video[0].codec_context.thread_count = 1
        reformatter = VideoReformatter()
        pictures = (reformatter.reformat(picture, format="rgb24") for picture in container.decode(video=0))
        return np.stack([picture.to_ndarray() for picture in pictures])


def _av() -> tuple[Any, Any]:
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise EVSError("H.264 needs PyAV: pip install 'evs-vllm[train]'") from error
    return av, VideoReformatter
