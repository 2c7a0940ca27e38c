# SPDX-License-Identifier: Apache-2.0
"""cosine_score: how much the direction of every feature vector turned since the previous temporal unit."""

import torch

from .. import _validate
from .._dispatch import implementation


def cosine_score(features: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Cosine distance of every token's features to the same place one temporal unit before.

    ``score[t, p] = 1 - cos(features[t, p], features[t - 1, p])`` in [0, 2], and ``score[0, :] = 0``. Equal vectors
    give 0 exactly, two zero vectors included; a zero vector beside another one gives 1.

    Args:
        features: (T, P, H) float16, bfloat16 or float32, contiguous, T, P, H >= 1; any device.
        backend: one of ``evs_kernels.BACKENDS``.

    Returns:
        (T, P) float32 on the same device. Sums are float32: a squared norm below about 1e-38 counts as a zero
        vector, and one above about 3e38 gives an undefined score.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong rank, empty, not contiguous, more than 2**30 tokens, or a backend that cannot run here.
    """
    _validate.clip_tokens("features", features, _validate.FLOAT_DTYPES)
    return implementation("cosine_score", backend, features.device)(features)
