# SPDX-License-Identifier: Apache-2.0
"""The ways to decode that are compared: vLLM's loaders with their codecs, and what leaves out what is not sampled."""

import os
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np

from bench.decode import sampled

SAMPLINGS: dict[str, dict[str, int]] = {
    "32 frames": {"num_frames": 32, "fps": -1},
    "64 frames": {"num_frames": 64, "fps": -1},
    "2 a second": {"num_frames": -1, "fps": 2},
}
"""As in ``--media-io-kwargs '{"video": ...}'``."""

Loaded = tuple[np.ndarray, list[int]]
"""Frames (n, height, width, 3), uint8 RGB, and their numbers."""

BASELINE = "opencv"


def _loader(name: str, **options: Any) -> Callable[[bytes, dict[str, int]], Loaded]:
    """A loader of vLLM's registry, with a codec of its."""

    def load(data: bytes, sampling: dict[str, int]) -> Loaded:
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

        frames, metadata = VIDEO_LOADER_REGISTRY.load(name).load_bytes(data, **sampling, **options)
        return np.asarray(frames), list(metadata["frames_indices"])

    return load


def _sampled(data: bytes, sampling: dict[str, int]) -> Loaded:
    """Numbers as vLLM's ``opencv`` chooses them."""
    frames, _, numbers = sampled.decode_sampled(data, _chooser(sampling), _threads(), lambda width, height: None)
    return frames, numbers


def _chooser(sampling: dict[str, int]) -> Callable[[sampled.Source], list[int]]:
    from vllm.multimodal.video import VideoBackend
    from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

    target = VideoTargetMetadata(**sampling, max_duration=300)
    return lambda source: VideoBackend.compute_frames_index_to_sample(VideoSourceMetadata(*source), target)


def _threads() -> int:
    return min(sampled.MOST_THREADS, len(os.sched_getaffinity(0)))


def _key_frames(data: bytes, sampling: dict[str, int]) -> Loaded:
    """The key frame before each sampled frame in its place: other pictures, and the least that can be decoded."""
    import av

    with av.open(BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = _threads(), "FRAME"
        stream.codec_context.skip_frame = "NONKEY"
        fps = float(stream.guessed_rate)
        numbers = _chooser(sampling)(sampled.Source(stream.frames, fps, stream.frames / fps))
        keys = {}
        first = None
        for frame in container.decode(stream):
            first = frame.pts if first is None else first
            keys[round(float((frame.pts - first) * frame.time_base) * fps)] = frame
        chosen = [max(key for key in keys if key <= number) for number in numbers]
        pictures = {key: keys[key].to_ndarray(format="rgb24") for key in set(chosen)}
        return np.stack([pictures[key] for key in chosen]), chosen


WAYS: dict[str, Callable[[bytes, dict[str, int]], Loaded]] = {
    BASELINE: _loader("opencv"),
    "opencv_dynamic": _loader("opencv_dynamic"),
    "torchcodec": _loader("opencv", backend="torchcodec"),
    "only what is needed": _sampled,
    "key frames only (*)": _key_frames,
}
"""By name. All but the last one give exact frames."""


def applies(way: str, sampling: dict[str, int]) -> bool:
    """Whether a way knows a sampling: ``opencv_dynamic`` goes by the frames a second alone."""
    return way != "opencv_dynamic" or sampling["fps"] > 0
