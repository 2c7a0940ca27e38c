# SPDX-License-Identifier: Apache-2.0
"""When the units of a clip begin, from what vLLM's loader says of the frames that it took."""

from collections.abc import Mapping
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
            took all of those frames.
        clip: The clip, which knows how many frames a unit has.
    """
    indices, fps = metadata.get("frames_indices"), metadata.get("fps")
    per_unit = 1 if clip.pixels is None else clip.pixels.frames
    if indices is None or not fps or metadata.get("do_sample_frames"):
        return None
    if len(indices) <= (clip.num_units - 1) * per_unit:
        return None
    return tuple(float(indices[unit * per_unit]) / float(fps) for unit in range(clip.num_units))
