# SPDX-License-Identifier: Apache-2.0
"""temporal_score: how much every token changed since the previous temporal unit."""

import torch

from .. import _validate
from .._dispatch import implementation


def temporal_score(tokens: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """L1 distance of every token to the same place one temporal unit before.

    ``score[t, p] = sum_d |tokens[t, p, d] - tokens[t - 1, p, d]|``, and ``score[0, :] = 0``.

    Args:
        tokens: (T, P, D) uint8, float16, bfloat16 or float32, contiguous, T, P, D >= 1; any device.
        backend: one of ``evs_kernels.BACKENDS``.

    Returns:
        (T, P) on the same device. int32 and exact for uint8; else float32, summed in float32, so the last bits
        depend on the backend. NaN in a token gives NaN.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong rank, empty, not contiguous, uint8 with D above 8421504 (the int32 score could overflow),
            more than 2**30 tokens, or a backend that cannot run here.
    """
    _validate.clip_tokens("tokens", tokens, _validate.TOKEN_DTYPES)
    return implementation("temporal_score", backend, tokens.device)(tokens)
