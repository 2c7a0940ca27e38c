# SPDX-License-Identifier: Apache-2.0
"""The options of EVS in one table: `OPTIONS`.

The table feeds the command line, ``additional_config``, the request keys, the cache identity, the rule which requests
ask for no more than the server gives, the table of docs/options.md and the error texts.
This module imports neither torch nor vLLM.
"""

import argparse
import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from evs_vllm.errors import ConfigError

CONFIG_KEY = "evs"
"""Key of our options in vLLM's ``additional_config``."""

REQUEST_PREFIX = "evs_"
"""Prefix of our keys in a request's ``mm_processor_kwargs``."""

POSITIONS = ("keep", "sequential")
SELECTION_NAMES = ("learned", "contrast", "paper")
"""The names of `evs_vllm.core.scorers.SELECTIONS`, the default first."""

BUDGETS = ("clip", "causal")
ENCODERS = ("auto", "reuse", "full")
MOST_TOKENS = 10**9
"""Largest number of tokens that an option takes: more than any clip has."""

MOST_THREADS = 1024
"""Largest number of threads that an option takes."""

MOST_CACHE_GB = 1024
"""Largest memory, in GiB, that an option takes."""

MOST_RANGES = 32
"""Largest number of time ranges of a focus."""

MOST_WEIGHT = 64
"""Largest weight of a time range of a focus."""

REQUEST_OVERRIDES = ("none", "stricter", "any")


def exact(number: float) -> Fraction:
    """The decimal that `number` was written as: 0.9 is nine tenths, not the nearest binary fraction."""
    return Fraction(repr(number))


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_TOKENS


def _is_focus(value: object) -> bool:
    return isinstance(value, list | tuple) and 1 <= len(value) <= MOST_RANGES and all(map(_is_range, value))


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        return False
    start, end, weight = value
    return bool(0 <= start < end <= MOST_TOKENS and 0 <= weight <= MOST_WEIGHT)


def _parse_scalar(text: str) -> object:
    """A command-line word as JSON would read it; what is not JSON stays a string, for `Option.check` to judge."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or more digits or brackets than Python reads
        return text


def shown(value: object) -> str:
    """A value for an error text, which it may not fill."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:190]}... ({len(text)} characters)"


def _drops_as_much(own: float | None, other: float | None) -> bool:
    return exact(own or 0) >= exact(other or 0)


def _caps_as_low(own: int | None, other: int | None) -> bool:
    return other is None or (own is not None and own <= other)


def _refreshes_as_seldom(own: int, other: int) -> bool:
    return (own or math.inf) >= (other or math.inf)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: Field of `EVSConfig`; the flag is ``--evs-<name>`` and the request key ``evs_<name>``.
        is_allowed: Whether a value is allowed.
        allowed: The allowed values, in words, for error texts and help.
        help: One sentence for ``--help`` and the documentation.
        metavar: Placeholder in ``--help``.
        affects: What of a clip the option shapes, all of which is part of the cache identity: its "prompt", what the
            "tower" computes, or what a tower that reuses computes ("reuse"). "" is for what shapes nothing.
        no_more: Whether a value, compared with the server's, keeps and computes at most as much for every clip. None
            where the option has no influence on that.
        nullable: Whether a server may leave it unset, as None.
        per_request: Whether a request may carry it.
        choices: The allowed strings of an option that is a choice.
        switch: Whether it is on where its flag stands without a value, as vLLM's ``--config`` files spell "true".
    """

    name: str
    is_allowed: Callable[[object], bool]
    allowed: str
    help: str
    metavar: str
    affects: Literal["prompt", "tower", "reuse", ""]
    no_more: Callable[[Any, Any], bool] | None = None
    nullable: bool = False
    per_request: bool = True
    choices: tuple[str, ...] | None = None
    switch: bool = False

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
            raise ConfigError(f"{shown_as or self.name} got {shown(value)}; allowed: {self.allowed}.")
        return value

    def add_to(self, group: Any, flag: str | None = None) -> None:
        """Adds the option to a parser or group of ``argparse``, as `flag`; its attribute is the request key."""

        def read(text: str) -> Any:
            try:
                return self.parse(text)
            except ConfigError as error:
                raise argparse.ArgumentTypeError(str(error).removeprefix(f"{self.flag} ")) from None

        group.add_argument(
            flag or self.flag,
            dest=self.request_key,
            type=read,
            default=None,
            metavar=self.metavar,
            **({"nargs": "?", "const": True} if self.switch else {}),
            help=self.help.replace("%", "%%"),
        )


def _choice(name: str, choices: tuple[str, ...], help: str, **others: Any) -> Option:
    return Option(
        name=name,
        is_allowed=lambda value: value in choices,
        allowed=" or ".join(choices),
        help=help,
        metavar="{" + ",".join(choices) + "}",
        choices=choices,
        **others,
    )


OPTIONS: tuple[Option, ...] = (
    Option(
        name="rate",
        is_allowed=lambda v: _is_number(v) and 0 <= v < 1,  # type: ignore[operator]
        allowed="a number from 0 (nothing is dropped) up to but not including 1",
        help="Fraction of a clip's video tokens to drop. 0 turns pruning off.",
        metavar="RATE",
        affects="prompt",
        no_more=_drops_as_much,
        nullable=True,
    ),
    Option(
        name="threshold",
        is_allowed=lambda v: _is_number(v) and 0 <= v <= 255,  # type: ignore[operator]
        allowed="a number from 0 (nothing is dropped) to 255",
        help="Instead of a rate: keep every token that changed by at least this, in the unit of the selection.",
        metavar="LEVEL",
        affects="prompt",
        no_more=_drops_as_much,
        nullable=True,
    ),
    _choice(
        "selection",
        SELECTION_NAMES,
        "Which tokens stay: those that differ most from what was last kept at their place, by a 'learned' descriptor "
        "or by 'contrast', or those whose pixels changed most since the unit before ('paper').",
        affects="prompt",
        # 'paper' keeps the same number of long clips and fewer of short ones.
        no_more=lambda own, other: own == "paper" or other != "paper",
    ),
    _choice(
        "budget",
        BUDGETS,
        "What the rate is counted over: the whole 'clip', or 'causal'ly what was there so far, so that what is kept of "
        "a unit does not depend on later ones and a video that has grown finds its beginning in the prefix cache.",
        affects="prompt",
        no_more=operator.eq,  # the causal one may owe a unit, and may lack later what it spent
    ),
    Option(
        name="focus",
        is_allowed=lambda v: v is None or _is_focus(v),
        allowed=f"a list of 1 to {MOST_RANGES} ranges [start, end, weight] with 0 <= start < end in seconds and "
        f"0 <= weight <= {MOST_WEIGHT}",
        help="Time ranges that matter more or less: what changes in one counts that many times, so that as many tokens "
        "stay, more of them in there. The first range that a unit lies in counts; outside of all the weight is 1.",
        metavar="RANGES",
        affects="prompt",
        nullable=True,
    ),
    _choice(
        "positions",
        POSITIONS,
        "Position IDs of kept tokens: 'keep' those of the unpruned prompt, or number them 'sequential'ly.",
        affects="prompt",
    ),
    Option(
        name="min_tokens_per_unit",
        is_allowed=lambda v: _is_count(v, 0),
        allowed=f"an integer from 0 to {MOST_TOKENS}",
        help="Keep at least this many tokens of every temporal unit.",
        metavar="N",
        affects="prompt",
        no_more=operator.le,
    ),
    Option(
        name="max_tokens",
        is_allowed=lambda v: v is None or _is_count(v, 1),
        allowed=f"an integer from 1 to {MOST_TOKENS}",
        help="Keep at most this many tokens of a clip (the first unit and the minimum per unit always stay).",
        metavar="N",
        affects="prompt",
        no_more=_caps_as_low,
        nullable=True,
    ),
    _choice(
        "encoder",
        ENCODERS,
        "Vision tower: 'reuse' computes kept patches and reuses the last keys and values of the others, 'full' "
        "computes every patch, 'auto' is 'reuse' where the family supports it.",
        affects="tower",
        no_more=lambda own, other: own == "reuse" or other != "reuse",
    ),
    Option(
        name="encoder_refresh",
        is_allowed=lambda v: _is_number(v) and 0 <= v <= 255,  # type: ignore[operator]
        allowed="a number from 0 (none) to 255",
        help="With encoder 'reuse', compute a dropped token all the same where it looks different from when its place "
        "was last computed, by this many hundredths of the learned descriptor's distance or more.",
        metavar="LEVEL",
        affects="reuse",
        no_more=_refreshes_as_seldom,
    ),
    _choice(
        "request_overrides",
        REQUEST_OVERRIDES,
        "Which evs_* keys a request may set: 'none', those that cannot keep more tokens ('stricter'), or 'any'.",
        affects="",
        per_request=False,
    ),
    Option(
        name="stream",
        is_allowed=lambda v: isinstance(v, bool),
        allowed="true or false",
        help="Whether the videos of a request, in their order, are parts of one stream: each is compared with what the "
        "ones before it last kept at each place, and keeps what is new.",
        metavar="{true,false}",
        switch=True,
        affects="prompt",
        no_more=operator.ge,
    ),
    Option(
        name="stream_cache_gb",
        is_allowed=lambda v: _is_number(v) and 0 <= v <= MOST_CACHE_GB,  # type: ignore[operator]
        allowed=f"a number from 0 to {MOST_CACHE_GB}",
        help="Memory, in GiB, for what the videos of streams leave to the next ones; what does not fit is made again "
        "from the request's own videos.",
        metavar="GIB",
        affects="",
        per_request=False,
    ),
    Option(
        name="processor_threads",
        is_allowed=lambda v: v is None or (_is_count(v, 1) and v <= MOST_THREADS),  # type: ignore[operator]
        allowed=f"an integer from 1 to {MOST_THREADS}",
        help="Threads with which a clip is judged and its pixels are resized; unset, as many as vLLM gives its "
        "processor, which is one in a server.",
        metavar="N",
        affects="",
        nullable=True,
        per_request=False,
    ),
)
