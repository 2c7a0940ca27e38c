# SPDX-License-Identifier: Apache-2.0
"""numba gather_rows: one block copy per row, whatever the dtype."""

import torch

from .._numba import njit
from .._parallel import for_ranges

_GRAIN_BYTES = 1024 * 1024  # below it, handing work to a thread costs more than the copy


@njit()
def _copy_rows(source, indices, out):
    for k in range(indices.shape[0]):
        # Not a slice assignment: numba checks that for overlap and then copies byte by byte.
        row, into = source[indices[k]], out[k]
        for i in range(row.shape[0]):
            into[i] = row[i]


def run(source: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.gather_rows."""
    out = torch.empty((indices.shape[0], source.shape[1]), dtype=source.dtype)
    # Bytes, because numpy has no bfloat16 and a copy needs no arithmetic.
    src, dst, rows = source.view(torch.uint8).numpy(), out.view(torch.uint8).numpy(), indices.numpy()
    grain = max(1, _GRAIN_BYTES // src.shape[1])
    for_ranges(lambda lo, hi: _copy_rows(src, rows[lo:hi], dst[lo:hi]), 0, len(rows), grain=grain)
    return out
