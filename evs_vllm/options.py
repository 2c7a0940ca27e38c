# SPDX-License-Identifier: Apache-2.0
"""The options of EVS in one table: `OPTIONS`.

The table feeds the command line, ``additional_config``, the request keys, the README table and the error texts.
This module imports neither torch nor vLLM.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evs_vllm.errors import ConfigError

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
        "Vision tower: 'reuse' computes kept patches and reuses the last keys and values of the others, 'full' "
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
