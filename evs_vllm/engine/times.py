# SPDX-License-Identifier: Apache-2.0
"""When the units of a clip begin, from what vLLM's loader says of the frames that it took."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evs_vllm.core.clip import Clip


def metadata_of(items: Any, number: int) -> Mapping[str, Any]:
    """What the loader says of one video; empty where it says nothing.

    Args:
        items: vLLM's items of the modality.
        number: Which of them.
    """
    metadata = getattr(items, "metadata", None)
    if isinstance(metadata, list):
        metadata = metadata[number]
    return metadata or {}


@dataclass
class Times:
    """What the loader says of the videos of a request: vLLM loses it where it looks for them in its processor cache.

    Attributes:
        videos: Of each, as from `metadata_of`.
        processed: Which of them are being processed, in order; None for all.
    """

    videos: Sequence[Mapping[str, Any]]
    processed: Sequence[int] | None = None

    @classmethod
    def of(cls, items: Any) -> "Times":
        """Those of vLLM's items of the modality, or of none."""
        return cls([] if items is None else [metadata_of(items, number) for number in range(items.get_count())])

    def of_processed(self, place: int) -> Mapping[str, Any]:
        """What is said of the video that stands there among those that are being processed."""
        return self.videos[place if self.processed is None else self.processed[place]]

    def names(self) -> list[str]:
        """A digest of each video's times: equal frames at other times are another video to who looks at times."""
        return [hashlib.sha256(repr(_spelled(video)).encode()).hexdigest()[:16] for video in self.videos]


def _spelled(video: Mapping[str, Any]) -> list[str]:
    indices: Any = video.get("frames_indices")
    each = [str(index) for index in indices] if hasattr(indices, "__iter__") else [str(indices)]
    return [str(video.get("fps")), str(video.get("do_sample_frames")), *each]


def seconds_of(items: Any, count: int) -> list[float | None]:
    """How long each of `count` videos is, in seconds; None where the loader does not say, or was not asked.

    Args:
        items: vLLM's items of the modality.
        count: How many there are.
    """
    durations = (metadata_of(items, number).get("duration") for number in range(count))
    return [float(each) if isinstance(each, int | float) and each > 0 else None for each in durations]


def unit_starts(metadata: Mapping[str, Any], clip: Clip) -> tuple[float, ...] | None:
    """(T,) seconds at which the units of a clip begin, or None where that is not known.

    Args:
        metadata: As from `metadata_of`; of use if it has the frames' indices and rate, and Hugging Face's processor
            took exactly those frames.
        clip: The clip, which knows how many frames a unit has.
    """
    indices, fps = metadata.get("frames_indices"), metadata.get("fps")
    per_unit = 1 if clip.pixels is None else clip.pixels.frames
    if indices is None or not fps or metadata.get("do_sample_frames"):
        return None
    if -(-len(indices) // per_unit) != clip.num_units:  # the processor took others, or fewer of them
        return None
    return tuple(float(indices[unit * per_unit]) / float(fps) for unit in range(clip.num_units))
