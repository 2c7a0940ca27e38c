# SPDX-License-Identifier: Apache-2.0
"""Checked settings of a server or a request: `EVSConfig`, whose fields are the rows of `evs_vllm.options.OPTIONS`.

This module imports neither torch nor vLLM.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from evs_vllm.errors import ConfigError, RequestError
from evs_vllm.options import OPTIONS, REQUEST_PREFIX

_BY_NAME = {option.name: option for option in OPTIONS}
_REQUEST_KEYS = {option.request_key: option for option in OPTIONS if option.per_request}


def exact(number: float) -> Fraction:
    """The decimal that `number` was written as: 0.9 is nine tenths, not the nearest binary fraction."""
    return Fraction(repr(number))


@dataclass(frozen=True)
class EVSConfig:
    """Checked settings of a server or, after `for_request`, of one request. See `OPTIONS` for the meaning.

    Raises:
        ConfigError: A value is not allowed, or `rate` and `threshold` contradict each other.
    """

    rate: float | None = None
    threshold: float | None = None
    positions: str = "keep"
    min_tokens_per_unit: int = 0
    max_tokens: int | None = None
    encoder: str = "auto"
    encoder_refresh: int = 8
    request_overrides: str = "stricter"
    reuse_obstacle: str = ""
    """Not an option: why this server cannot run the encoder 'reuse', or "". Set at start-up by `resolve_encoder`."""

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is not None:
                option.check(value)
        if self.rate and self.threshold:
            raise ConfigError(
                f"rate={self.rate} and threshold={self.threshold} contradict each other: a rate fixes how many tokens "
                "stay, a threshold lets the content decide. Set one; max_tokens can cap a threshold."
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "EVSConfig":
        """Builds a config from ``additional_config["evs"]`` or the command line.

        Raises:
            ConfigError: `options` is no mapping, has an unknown key or a value that is not allowed.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"The evs options must be a mapping such as {{'rate': 0.75}}, got {options!r}.")
        unknown = sorted(str(key) for key in options if key not in _BY_NAME)
        if unknown:
            raise ConfigError(f"Unknown evs option(s) {', '.join(unknown)}; known: {', '.join(_BY_NAME)}.")
        for name, value in options.items():
            if value is None and name not in ("rate", "threshold", "max_tokens"):
                _BY_NAME[name].check(value)
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`."""
        return {option.name: getattr(self, option.name) for option in OPTIONS}

    def resolve_encoder(self, obstacle: str) -> "EVSConfig":
        """The settings of a server that can run the encoder 'reuse' unless there is an `obstacle`.

        Raises:
            ConfigError: 'reuse' was asked for and there is an obstacle.
        """
        if self.encoder == "reuse" and obstacle:
            raise ConfigError(f"--evs-encoder reuse is not possible here: {obstacle} Use 'full' or 'auto'.")
        encoder = self.encoder if self.encoder != "auto" else "full" if obstacle else "reuse"
        return replace(self, encoder=encoder, reuse_obstacle=obstacle)

    @property
    def active(self) -> bool:
        """Whether these settings can drop a token of some clip."""
        return bool(self.rate or self.threshold or self.max_tokens)

    @property
    def identity(self) -> str:
        """What of these settings shapes a clip's prompt and embeddings; equal settings have equal identities.

        It is mixed into the multimodal cache keys. Bump the leading version when the method itself changes.
        """
        if not self.active:
            return ""
        rate = exact(self.rate) if self.rate else 0
        threshold = exact(self.threshold) if self.threshold else 0
        return (
            f"evs1 metric=rgb rate={rate} threshold={threshold} positions={self.positions} "
            f"min={self.min_tokens_per_unit} max={self.max_tokens} "
            f"encoder={self.encoder} refresh={self.encoder_refresh if self.encoder == 'reuse' else 0}"
        )

    def describe(self) -> str:
        """One sentence fragment for the start-up line."""
        if not self.active:
            return "nothing by default"
        what = []
        if self.rate:
            what.append(f"{100 * self.rate:g} % of the video tokens of each clip")
        elif self.threshold:
            what.append(f"video tokens whose mean pixel change is below {self.threshold:g}")
        if self.max_tokens:
            what.append(f"what exceeds {self.max_tokens} tokens per clip")
        kept = f", at least {self.min_tokens_per_unit} per unit kept" if self.min_tokens_per_unit else ""
        encoder = "" if self.encoder == "auto" else f", {self.encoder} encoder"
        return f"{' and '.join(what)}{kept} ({self.positions} positions{encoder})"

    def costs_no_more_than(self, other: "EVSConfig") -> bool:
        """Whether for every clip these settings may keep and compute at most as many tokens as `other` may."""
        refresh, other_refresh = self.encoder_refresh or math.inf, other.encoder_refresh or math.inf
        computes_less = self.encoder == "reuse" and refresh >= other_refresh
        if self.active and other.active and other.encoder == "reuse" and not computes_less:
            return False
        return self.cannot_keep_more_than(other)

    def cannot_keep_more_than(self, other: "EVSConfig") -> bool:
        """Whether for every clip these settings keep at most as many tokens as `other` does."""
        if not other.active:
            return True
        if not self.active or self.min_tokens_per_unit > other.min_tokens_per_unit:
            return False
        if other.max_tokens is not None and (self.max_tokens is None or self.max_tokens > other.max_tokens):
            return False
        if other.rate:
            return bool(self.rate) and exact(self.rate or 0) >= exact(other.rate)
        if other.threshold:
            return bool(self.threshold) and exact(self.threshold or 0) >= exact(other.threshold)
        return True

    def for_request(self, overrides: Mapping[str, Any]) -> "EVSConfig":
        """The settings of a request that carries `overrides` on a server with these settings.

        Args:
            overrides: The request's ``evs_*`` keys (see `split_request_kwargs`). ``evs_rate=0`` turns EVS off for the
                request; a rate replaces the server's threshold and the other way round.

        Raises:
            RequestError: A key is unknown, a value is not allowed, two keys contradict each other, or the server's
                `request_overrides` does not admit them.
        """
        if not overrides:
            return self
        unknown = sorted(key for key in overrides if key not in _REQUEST_KEYS)
        if unknown:
            raise RequestError(
                f"Unknown key(s) in mm_processor_kwargs: {', '.join(unknown)}; "
                f"evs keys that a request may set: {', '.join(_REQUEST_KEYS)}."
            )
        if self.request_overrides == "none":
            raise RequestError(
                f"This server takes no evs_* keys per request, got {', '.join(sorted(overrides))}. Leave them out, or "
                "start the server with --evs-request-overrides stricter (or any)."
            )
        try:
            values = {_REQUEST_KEYS[key].name: _REQUEST_KEYS[key].check(value, key) for key, value in overrides.items()}
            effective = self._with(values)
        except ConfigError as error:
            raise RequestError(f"Bad mm_processor_kwargs: {error}") from None
        if effective.encoder == "reuse" and self.reuse_obstacle:
            raise RequestError(f"evs_encoder 'reuse' is not possible on this server: {self.reuse_obstacle}")
        if self.request_overrides == "stricter" and not effective.costs_no_more_than(self):
            raise RequestError(
                f"The evs_* keys of this request ({', '.join(f'{k}={v}' for k, v in sorted(overrides.items()))}) could "
                f"cost more than the server's setting, which drops {self.describe()}. Ask for less, or "
                "start the server with --evs-request-overrides any."
            )
        return effective

    def _with(self, values: Mapping[str, Any]) -> "EVSConfig":
        if "rate" in values and not values["rate"]:
            return replace(self, threshold=None, max_tokens=None, **values)
        changed = {name: value for name, value in values.items() if (name, value) != ("encoder", "auto")}
        if "rate" in values:
            changed.setdefault("threshold", None)
        elif "threshold" in values:
            changed["rate"] = None
        return replace(self, **changed)


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
