# SPDX-License-Identifier: Apache-2.0
"""The options of EVS: one table (`OPTIONS`) and the class that holds checked values (`EVSConfig`).

The table feeds the command line, ``additional_config``, the request keys, the README table and the error texts.
This module imports neither torch nor vLLM.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from evs_vllm.errors import ConfigError, RequestError

CONFIG_KEY = "evs"
"""Key of our options in vLLM's ``additional_config``."""

REQUEST_PREFIX = "evs_"
"""Prefix of our keys in a request's ``mm_processor_kwargs``."""

POSITIONS = ("keep", "sequential")
ENCODERS = ("auto", "reuse", "full")
REQUEST_OVERRIDES = ("none", "stricter", "any")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _parse_scalar(text: str) -> object:
    """A command-line word as JSON would read it; what is not JSON stays a string, for `Option.check` to judge."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Field of `EVSConfig`; the flag is ``--evs-<name>`` and the request key ``evs_<name>``.
        is_allowed: Whether a value is allowed.
        allowed: The allowed values, in words, for error texts and help.
        help: One sentence for ``--help`` and the README.
        metavar: Placeholder in ``--help``.
        per_request: Whether a request may carry it.
        choices: The allowed strings of an option that is a choice.
    """

    name: str
    is_allowed: Callable[[object], bool]
    allowed: str
    help: str
    metavar: str
    per_request: bool = True
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        return "--evs-" + self.name.replace("_", "-")

    @property
    def request_key(self) -> str:
        return REQUEST_PREFIX + self.name

    def parse(self, text: str) -> Any:
        """Reads and checks a command-line word.

        Raises:
            ConfigError: The value is not allowed.
        """
        value = text if self.choices else _parse_scalar(text)
        return self.check(value, self.flag)

    def check(self, value: object, shown_as: str | None = None) -> Any:
        """Returns `value` if it is allowed.

        Raises:
            ConfigError: The value is not allowed; the text names it as `shown_as`.
        """
        if not self.is_allowed(value):
            raise ConfigError(f"{shown_as or self.name} got {value!r}; allowed: {self.allowed}.")
        return value


OPTIONS: tuple[Option, ...] = (
    Option(
        "rate",
        lambda v: _is_number(v) and 0 <= v < 1,  # type: ignore[operator]
        "a number from 0 (nothing is dropped) up to but not including 1",
        "Fraction of a clip's video tokens to drop. 0 turns pruning off.",
        "RATE",
    ),
    Option(
        "threshold",
        lambda v: _is_number(v) and 0 <= v <= 255,  # type: ignore[operator]
        "a number from 0 (nothing is dropped) to 255",
        "Instead of a rate: keep every token whose mean absolute pixel change (0..255) is at least this.",
        "LEVEL",
    ),
    Option(
        "positions",
        lambda v: v in POSITIONS,
        " or ".join(POSITIONS),
        "Position IDs of kept tokens: 'keep' those of the unpruned prompt, or number them 'sequential'ly.",
        "{" + ",".join(POSITIONS) + "}",
        choices=POSITIONS,
    ),
    Option(
        "min_tokens_per_unit",
        lambda v: _is_count(v, 0),
        "an integer of at least 0",
        "Keep at least this many tokens of every temporal unit.",
        "N",
    ),
    Option(
        "max_tokens",
        lambda v: v is None or _is_count(v, 1),
        "an integer of at least 1",
        "Keep at most this many tokens of a clip (the first unit and the minimum per unit always stay).",
        "N",
    ),
    Option(
        "encoder",
        lambda v: v in ENCODERS,
        " or ".join(ENCODERS),
        "Vision tower: 'reuse' computes kept patches only and reuses the last keys and values of the others, 'full' "
        "computes every patch, 'auto' is 'reuse' where the family supports it.",
        "{" + ",".join(ENCODERS) + "}",
        choices=ENCODERS,
    ),
    Option(
        "encoder_refresh",
        lambda v: _is_count(v, 0),
        "an integer of at least 0 (0: none)",
        "With encoder 'reuse', compute up to one in N of the dropped tokens all the same: those that differ most from "
        "when their place was last computed.",
        "N",
    ),
    Option(
        "request_overrides",
        lambda v: v in REQUEST_OVERRIDES,
        " or ".join(REQUEST_OVERRIDES),
        "Which evs_* keys a request may set: 'none', those that cannot keep more tokens ('stricter'), or 'any'.",
        "{" + ",".join(REQUEST_OVERRIDES) + "}",
        per_request=False,
        choices=REQUEST_OVERRIDES,
    ),
)

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
