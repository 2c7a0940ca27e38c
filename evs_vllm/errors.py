# SPDX-License-Identifier: Apache-2.0
"""Errors that evs-vllm raises. Each message says what was wrong, what is allowed and what to do.

All of them are ``ValueError``s: vLLM's OpenAI server answers a ``ValueError`` raised while it prepares a request
with HTTP 400 and goes on serving.
"""


class EVSError(ValueError):
    """Base class of every error that this package raises on purpose."""


class ConfigError(EVSError):
    """An option has a value that is not allowed, or two options contradict each other."""


class RequestError(EVSError):
    """A request's ``evs_*`` keys cannot be honoured."""


class UnsupportedError(EVSError):
    """EVS was asked for where it cannot work: the architecture, the vLLM version or another vLLM option."""


class PlanError(EVSError):
    """A retention plan is inconsistent, or was made by another version of this package."""


class ServerError(EVSError):
    """A server refused a request, gave up on it or did not answer.

    Attributes:
        status: The HTTP status that it answered with or names in its stream, or None where nothing came.
        message: The server's own words, or what went wrong on the way.
    """

    def __init__(self, text: str, message: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.message = message
