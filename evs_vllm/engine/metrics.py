# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the processes that plan clips (the API servers), served by vLLM's ``/metrics``.

| name | type | meaning |
|---|---|---|
| ``evs:clips_total`` | counter | clips of requests that EVS was active for |
| ``evs:video_tokens_total`` | counter | their video tokens before pruning |
| ``evs:video_tokens_kept_total`` | counter | their video tokens in the prompts |
| ``evs:frames_as_images_total`` | counter | requests whose images look like the frames of a video (not pruned) |
| ``evs:frontend_clips_total`` | counter | clips planned, by who made their pixels (none on processor-cache hits) |
| ``evs:stream_chunks_total`` | counter | clips of streams planned, by what is new in them (none on cache hits) |
| ``evs:planning_time_seconds`` | histogram | score, select and lay out one clip (none on processor-cache hits) |
| ``evs:rows_time_seconds`` | histogram | resize and cut one clip, where Hugging Face's processor does not |
| ``evs:build_info`` | gauge | 1; the labels are the parts of the `evs_vllm.fingerprint`, there from the start |

They are told apart by the label ``selection``, but for the clips of the front end, which have the label ``path``
(`PATHS`), those of streams, which have the label ``news`` (`NEWS`), the time for rows and the requests with images. The
prefix is ``evs:`` because vLLM unregisters every collector with "vllm" in its name when it starts its own.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.fingerprint import METRIC
from evs_vllm.options import SELECTION_NAMES

PATHS = ("rows", "processor")
"""Who made a clip's pixel rows: this package, of the tokens alone that are computed, or Hugging Face's processor."""

NEWS = ("first", "some", "none", "rebuilt")
"""What is new in a clip of a stream: all of it, as none went before or the size changed; some tokens; nothing, so that
one token stands for it. "rebuilt" are clips that were planned before, and what they left had been evicted."""

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics(NamedTuple):
    clips: Counter
    tokens: Counter
    tokens_kept: Counter
    frames_as_images: Counter
    frontend_clips: Counter
    stream_chunks: Counter
    planning_time: Histogram
    rows_time: Histogram


@cache
def metrics() -> Metrics:
    """The collectors, registered on first use."""
    label = ("selection",)
    found = Metrics(
        Counter("evs:clips", "Number of video clips of requests that EVS was active for.", label),
        Counter("evs:video_tokens", "Number of video tokens of these clips before pruning.", label),
        Counter("evs:video_tokens_kept", "Number of video tokens of these clips kept in the prompts.", label),
        Counter("evs:frames_as_images", "Number of requests whose images look like the frames of a video."),
        Counter("evs:frontend_clips", "Number of clips planned, by who made their pixel rows.", ("path",)),
        Counter("evs:stream_chunks", "Number of clips of streams planned, by what is new in them.", ("news",)),
        Histogram("evs:planning_time_seconds", "Time to score, select and lay out one clip.", label, buckets=_BUCKETS),
        Histogram("evs:rows_time_seconds", "Time to make the pixel rows of one clip.", buckets=_BUCKETS),
    )
    for name in SELECTION_NAMES:  # series that are there from the start begin at 0
        for collector in (found.clips, found.tokens, found.tokens_kept, found.planning_time):
            collector.labels(name)
    for path in PATHS:
        found.frontend_clips.labels(path)
    for news in NEWS:
        found.stream_chunks.labels(news)
    return found


_shown: list[dict[str, str]] = []


@cache
def _build_info(names: tuple[str, ...]) -> Gauge:
    # Several API server processes cannot share an Info. Of their gauges, those with the same labels become one series,
    # and processes that disagree show two.
    return Gauge(METRIC, "What has to agree between servers, as labels.", names, multiprocess_mode="mostrecent")


def show_fingerprint(parts: Mapping[str, str]) -> None:
    """Shows the fingerprint of the engine that this process serves as labels of a series that is 1.

    A series cannot be taken back where several processes share them, so that of an engine before it is 0.
    """
    info = _build_info(tuple(parts))
    for earlier in _shown:
        info.labels(**earlier).set(0)
    info.labels(**parts).set(1)
    if dict(parts) not in _shown:
        _shown.append(dict(parts))


def news_of(clip: Clip, plan: RetentionPlan) -> str:
    """Which of `NEWS` a clip of a stream is, planned for the first time."""
    if clip.previous is None:
        return "first"
    return "none" if plan.unchanged else "some"
