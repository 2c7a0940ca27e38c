# SPDX-License-Identifier: Apache-2.0
"""pool_frames: a low-resolution picture of every temporal unit, from the frames as a decoder gives them."""

import torch

from .. import _validate
from .._dispatch import implementation


def pool_frames(
    frames: torch.Tensor, rows: int, columns: int, unit_frames: int = 2, *, backend: str = "auto"
) -> torch.Tensor:
    """Averages the pixels of every temporal unit over a grid that covers the whole picture.

    A unit is ``unit_frames`` frames in a row; where F is not a multiple of them, the last frame stands for those that
    the last unit lacks. Along each side the edges of the cells lie at ``floor(i * pixels * 256 / cells)`` 256ths of a
    pixel, and a pixel counts in a cell as much as lies in it: in 256ths along either side, and their product. The mean
    over a cell and the frames of the unit is exact and rounded half up. Where rows and columns divide H and W it is the
    plain mean, as `pool_tokens` gives it of the same pixels. A grid finer than the picture repeats pixels.

    Args:
        frames: (F, H, W, C) uint8, contiguous, every dimension >= 1; any device.
        rows: cells one above another; from 1 to 256 * H.
        columns: cells beside each other; from 1 to 256 * W.
        unit_frames: frames in a temporal unit; >= 1.
        backend: one of ``evs_kernels.BACKENDS``. cpu reads frames at about the speed of memory.

    Returns:
        (ceil(F / unit_frames), rows, columns, C) uint8 on the same device, the same in every backend.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong rank, empty, not contiguous, a number out of range, frames of more than 2**31 values or units
            of more than 2**38, or a backend that cannot run here.
    """
    _validate.frames("frames", frames)
    unit_frames = _validate.count("unit_frames", unit_frames, smallest=1)
    _validate.unit_size(frames, unit_frames)
    rows = _validate.cells("rows", rows, frames.shape[1])
    columns = _validate.cells("columns", columns, frames.shape[2])
    return implementation("pool_frames", backend, frames.device)(frames, rows, columns, unit_frames)
