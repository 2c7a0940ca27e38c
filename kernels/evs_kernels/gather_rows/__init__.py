# SPDX-License-Identifier: Apache-2.0
"""gather_rows: the kept rows of a larger array."""

import torch

from .. import _validate
from .._dispatch import implementation


def gather_rows(source: torch.Tensor, indices: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Copies rows: ``result[k] = source[indices[k]]``.

    Args:
        source: (N, H), any dtype, contiguous, N, H >= 1; any device.
        indices: int64 (K,), contiguous, K >= 0, on the same device; any order, repeats allowed, 0 <= index < N.
        backend: one of ``evs_kernels.BACKENDS``.

    Returns:
        (K, H), the source's dtype and device, bit for bit.

    Raises:
        TypeError: not tensors, or indices of another dtype.
        ValueError: wrong rank, empty source, not contiguous, two devices, an index out of bounds (CPU only: on a GPU
            the check would wait for the device, and the row of a bad index is filled with zeros by triton), or a
            backend that cannot run here.
    """
    _validate.tensor("source", source, "NH", None)
    _validate.tensor("indices", indices, "K", (torch.int64,), smallest=0)
    _validate.same_device("indices", indices, "source", source)
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.numpy().min()), int(indices.numpy().max())
        if low < 0 or high >= source.shape[0]:
            raise ValueError(
                f"indices: got values in [{low}, {high}]; allowed: [0, {source.shape[0] - 1}]. "
                "Check that they belong to this source."
            )
    return implementation("gather_rows", backend, source.device)(source, indices)
