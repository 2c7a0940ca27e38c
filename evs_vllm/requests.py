# SPDX-License-Identifier: Apache-2.0
"""What one request may set: its ``evs_*`` keys in ``mm_processor_kwargs``, and which of them a server admits.

This module imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evs_vllm.config import EVSConfig
from evs_vllm.errors import ConfigError, RequestError
from evs_vllm.options import OPTIONS, REQUEST_PREFIX, shown

_REQUEST_KEYS = {option.request_key: option for option in OPTIONS if option.per_request}

AFTER_KEY = REQUEST_PREFIX + "after"
"""Key of a request whose first video goes on from one of an earlier request: that one's cache identity. No option: it
says what the request is about, and a server that takes no options per request takes it."""

MOST_CHARACTERS = 1024
"""Longest cache identity that a request may give."""


def admit(server: EVSConfig, overrides: Mapping[str, Any]) -> EVSConfig:
    """The settings of a request that carries `overrides` on a server.

    Args:
        server: The server's settings.
        overrides: The request's ``evs_*`` keys (see `split_request_kwargs`). ``evs_rate=0`` turns EVS off for the
            request, but for what it sets beside it; a rate replaces the server's threshold and the other way round.
            `AFTER_KEY` is checked and changes no setting.

    Raises:
        RequestError: A key is unknown, a value is not allowed, two keys contradict each other, or the server's
            `request_overrides` does not admit them.
    """
    settings = _admit(server, {key: value for key, value in overrides.items() if key != AFTER_KEY})
    if (after := overrides.get(AFTER_KEY)) is None:
        return settings
    if not isinstance(after, str) or not 1 <= len(after) <= MOST_CHARACTERS:
        raise RequestError(
            f"Bad mm_processor_kwargs: {AFTER_KEY} got {shown(after)}; allowed: the cache identity of a video, a "
            f'string of 1 to {MOST_CHARACTERS} characters (of a rendered prompt, prompt["mm_hashes"]["video"][-1]).'
        )
    if not settings.stream or not settings.active:
        raise RequestError(
            f"{AFTER_KEY} says which video this request's first one goes on from, and that is so in a stream alone. "
            "Set evs_stream to true and a rate or threshold that drops something, or leave it out."
        )
    return settings


def _admit(server: EVSConfig, overrides: Mapping[str, Any]) -> EVSConfig:
    if not overrides:
        return server
    unknown = sorted(key for key in overrides if key not in _REQUEST_KEYS)
    if unknown:
        raise RequestError(
            f"Unknown key(s) in mm_processor_kwargs: {', '.join(unknown)}; "
            f"evs keys that a request may set: {', '.join((*_REQUEST_KEYS, AFTER_KEY))}."
        )
    if server.request_overrides == "none":
        raise RequestError(
            f"This server takes no evs_* keys per request, got {', '.join(sorted(overrides))}. Leave them out, or "
            "start the server with --evs-request-overrides stricter (or any)."
        )
    try:
        values = {_REQUEST_KEYS[key].name: _REQUEST_KEYS[key].check(value, key) for key, value in overrides.items()}
        effective = _with(server, values)
    except ConfigError as error:
        raise RequestError(f"Bad mm_processor_kwargs: {error}") from None
    if effective.encoder == "reuse" and server.why_not_reuse:
        raise RequestError(f"evs_encoder 'reuse' is not possible on this server: {server.why_not_reuse}")
    if server.request_overrides == "stricter" and not effective.is_at_most(server):
        raise RequestError(
            f"The evs_* keys of this request ({', '.join(f'{k}={v}' for k, v in sorted(overrides.items()))}) could "
            f"cost more than the server's setting, which drops {server.describe()}. Ask for less, or "
            "start the server with --evs-request-overrides any."
        )
    return effective


def _with(server: EVSConfig, values: Mapping[str, Any]) -> EVSConfig:
    changed = {name: value for name, value in values.items() if (name, value) != ("encoder", "auto")}
    if "rate" in values:
        changed.setdefault("threshold", None)
        if not values["rate"]:
            changed.setdefault("max_tokens", None)
    elif "threshold" in values:
        changed["rate"] = None
    settings = replace(server, **changed)
    if settings.threshold and "threshold" not in values and settings.selection != server.selection:
        raise ConfigError(
            f"the server's threshold {server.threshold:g} is one of selection {server.selection!r} and means nothing "
            f"to {settings.selection!r}. Set evs_threshold or evs_rate as well."
        )
    return settings


def split_request_kwargs(kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits ``mm_processor_kwargs`` into (our ``evs_*`` keys, the rest)."""
    ours: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in (kwargs or {}).items():
        (ours if isinstance(key, str) and key.startswith(REQUEST_PREFIX) else rest)[key] = value
    return ours, rest


def refuse_keys(kwargs: Mapping[str, Any] | None) -> None:
    """The check of ``mm_processor_kwargs`` where EVS is off.

    Raises:
        RequestError: There is an ``evs_*`` key.
    """
    ours, _ = split_request_kwargs(kwargs)
    if ours:
        raise RequestError(
            f"EVS is off here, but the request sets {', '.join(sorted(ours))}. Leave them out, or start vLLM with an "
            "--evs-* option (--evs-rate 0 prunes only what requests ask for)."
        )
