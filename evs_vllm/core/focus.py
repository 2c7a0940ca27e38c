# SPDX-License-Identifier: Apache-2.0
"""The option ``focus``: time ranges of a clip in which changes count more or less."""

import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.errors import UnsupportedError

SIXTEENTHS = 16
"""A weight of 1; weights are rounded to whole sixteenths, so that choosing by them stays exact."""


def unit_weights(clip: Clip, config: EVSConfig) -> torch.Tensor | None:
    """How much the changes of each unit count, as the option ``focus`` says, in sixteenths.

    A unit lies in a range if it begins before the range's end and ends after its start; it ends where the next one
    begins, the last one after as long as the one before.

    Returns:
        (T,) int32 on the CPU, or (T + 1,) for a clip with `Clip.previous`; None where all count the same.

    Raises:
        UnsupportedError: There is a focus, and the clip does not say when its units begin.
    """
    if not config.focus:
        return None
    if clip.starts is None:
        raise UnsupportedError(
            "A focus needs to know when the clip's units begin, and this video does not say so: its frames come "
            "without times, or Hugging Face's processor samples them. Leave the focus out."
        )
    starts = clip.starts
    last = starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 0.0)
    weights = [] if clip.previous is None else [1.0]
    for start, end in zip(starts, (*starts[1:], last), strict=True):
        inside = (weight for first, until, weight in config.focus if start < until and max(start, end) > first)
        weights.append(next(inside, 1.0))
    return torch.tensor([round(SIXTEENTHS * weight) for weight in weights], dtype=torch.int32)
