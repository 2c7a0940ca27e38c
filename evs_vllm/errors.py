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
