# SPDX-License-Identifier: Apache-2.0
"""The request that a thread is processing, for what vLLM's processor calls without handing it on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from evs_vllm.config import EVSConfig
from evs_vllm.engine.streams import Stream
from evs_vllm.engine.times import Times
from evs_vllm.families.watched import Watch

OFF = EVSConfig()


@dataclass
class Request:
    """The request that a thread is processing. vLLM calls `apply` and all it calls synchronously.

    Attributes:
        settings: Its settings.
        cache: vLLM's processor cache, if it has one.
        watch: What its video processor was given, if that is watched.
        times: When its videos' frames were taken, if that decides what is kept.
        stream: Its videos, if they are parts of one stream.
    """

    settings: EVSConfig = OFF
    cache: Any = None
    watch: Watch | None = None
    times: Times | None = None
    stream: Stream | None = None


_NONE = Request()
current_request: ContextVar[Request] = ContextVar("evs_request", default=_NONE)
"""The one that this thread is processing."""

profiling: ContextVar[bool] = ContextVar("evs_profiling", default=False)
"""Whether it is one of vLLM's own, by which memory is profiled."""

T = TypeVar("T")


@contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Gives a variable a value in this context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
