# SPDX-License-Identifier: Apache-2.0
"""numba's compiler with a disk cache that may be missing."""

import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger(__name__)


def njit(fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: nopython, without the GIL, cached on disk when there is a place to write.

    numba keeps its cache in NUMBA_CACHE_DIR when set, else beside the source, else in the user's cache folder. When
    none can be written (read-only container) it raises while decorating; the kernel is then compiled per process.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError as error:
            logger.warning(
                "No folder for numba's cache, so every process compiles anew; set NUMBA_CACHE_DIR (%s)", error
            )
            return numba.njit(nogil=True, fastmath=fastmath)(function)

    return wrap
