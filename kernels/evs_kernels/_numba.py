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
    none can be written (read-only container) it raises while decorating; the kernel is then compiled per process. So it
    is where a disk is full, or what is on it cannot be read: numba would end the call with that.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel = numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError as error:
            logger.warning(
                "No folder for numba's cache, so every process compiles anew; set NUMBA_CACHE_DIR (%s)", error
            )
            return numba.njit(nogil=True, fastmath=fastmath)(function)
        if (cache := getattr(kernel, "_cache", None)) is not None:  # not with NUMBA_DISABLE_JIT
            for name in ("load_overload", "save_overload"):
                _forgive(cache, name)
        return kernel

    return wrap


def _forgive(cache: Any, name: str) -> None:
    """Lets a method of a numba cache warn where it would raise, and return None: nothing is there."""
    stock = getattr(cache, name)

    def method(*args: Any) -> Any:
        try:
            return stock(*args)
        except Exception as error:
            logger.warning(
                "numba's cache in %s cannot be used, so this process compiles anew (%s: %s). Make room there, empty "
                "it, or set NUMBA_CACHE_DIR to another folder.",
                cache.cache_path,
                type(error).__name__,
                error,
            )
            return None

    setattr(cache, name, method)
