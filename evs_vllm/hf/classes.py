# SPDX-License-Identifier: Apache-2.0
"""The classes of transformers that EVS can prune in: one table."""

from dataclasses import dataclass

from evs_vllm.families.base import PixelStats

_CLIP = PixelStats((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = PixelStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ModelClass:
    """One row.

    Attributes:
        stats: How the processors of all released models of the class normalise.
        units_apart: Whether text stands between temporal units, each of which is then laid out as a picture.
        reuse: Whether `evs_vllm.hf.tower` runs its vision tower.
    """

    stats: PixelStats
    units_apart: bool = False
    reuse: bool = True


CLASSES = {
    "Qwen2VLForConditionalGeneration": ModelClass(_CLIP),
    "Qwen2_5_VLForConditionalGeneration": ModelClass(_CLIP),
    "Qwen3VLForConditionalGeneration": ModelClass(_HALF, units_apart=True, reuse=False),
}

SUPPORTED = ", ".join(CLASSES)
"""For error texts."""
