# SPDX-License-Identifier: Apache-2.0
"""The threshold as a score."""

import math

import numpy as np

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def threshold_bits(threshold: float, is_float: bool) -> int | None:
    """Bits (as int32) of the smallest score that passes, or None when no score can.

    Args:
        threshold: not NaN.
        is_float: whether scores are float32, else int32.
    """
    if is_float:
        with np.errstate(over="ignore"):
            return int(np.float32(threshold).view(np.int32))
    if threshold > INT32_MAX:
        return None
    return INT32_MIN if threshold < INT32_MIN else math.ceil(threshold)
