# SPDX-License-Identifier: Apache-2.0
"""How much each token of a clip changed since the unit before.

Source: Efficient Video Sampling, arXiv 2510.14624, RGB mode: the L1 distance between the pixels of a token's patch and
of the same patch one unit earlier, before the vision encoder.
"""

import torch

import evs_kernels


def pixel_change(tokens: torch.Tensor) -> torch.Tensor:
    """Scores every token by its summed absolute pixel change.

    Args:
        tokens: (T, P, D) uint8, the D pixel values of each token's patch; CPU or CUDA.

    Returns:
        (T, P) int32: ``score[t, p] = sum_d |tokens[t, p, d] - tokens[t-1, p, d]|``; unit 0 scores 0.
    """
    return evs_kernels.temporal_score(tokens)
