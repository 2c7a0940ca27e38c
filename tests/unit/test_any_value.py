# SPDX-License-Identifier: Apache-2.0
"""Whatever value an option is given, by whichever way: it works, or the answer is the option's own text."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import ConfigError, EVSError, RequestError
from evs_vllm.options import OPTIONS, Option
from evs_vllm.requests import admit

VALUES = [
    0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, -(10**400), 10**5000, 1e-320, 5e-324, 1e308, -0.0, 0.5,
    math.nan, math.inf, -math.inf, True, False, None, "", "0.5", "keep", "paper", "contrast", "1e3", "x" * 10_000, [],
    [1], {}, {"a": 1}, (1,), 10**9, 10**9 + 1,
    0.1 + 0.2, 1 - 2**-53, 254.99999999999997, 1.0, 255, 256,
]  # fmt: skip
WORDS = [
    "0", "-1", "1e-320", "1e400", "-1e400", "9" * 400, "9" * 5000, "NaN", "Infinity", "true", "null", "", "[",
    "[" * 100_000, "{}", '"keep"', '"paper"', "learned", "0x10", "1_000", "½", "0.75", "1e2",
]  # fmt: skip

any_value = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
)
PYTHONS_OWN = (
    "convert",
    "too big",
    "too large",
    "multiple values",
    "digits",
    "NoneType",
    "unsupported operand",
    "recursion",
)


CLIP = Clip(torch.arange(12 * 48).mul_(3).to(torch.uint8).view(4, 3, 48), (4, 1, 3), TokenPixels(1, 3, 1, 4))


def is_own_text(option: Option, text: str, value: Any) -> bool:
    """An error about a value names the option, says what is allowed, and is not what Python says."""
    quoted = value if isinstance(value, str) else ""  # the error repeats it, whatever it says
    pythons_own = [words for words in PYTHONS_OWN if words not in quoted]
    return (option.name in text or option.flag in text) and not any(words in text for words in pythons_own)


def try_it(option: Option, config: EVSConfig) -> None:
    """What is allowed works: a clip is planned."""
    assert isinstance(config.identity, str) and isinstance(config.describe(), str)
    if config.active:
        plan = make_plan(CLIP, config)
        assert 3 <= plan.num_kept <= 12, option.name


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
@given(value=any_value)
def test_in_a_mapping(option: Option, value: Any) -> None:
    for base in ({"rate": 0.5}, {"threshold": 30}, {"max_tokens": 5}, {"rate": 0.5, "encoder": "reuse"}):
        if option.name in ("rate", "threshold"):
            base = {}
        try:
            config = EVSConfig.from_mapping({**base, option.name: value})
        except ConfigError as error:
            assert is_own_text(option, str(error), value) and option.allowed in str(error) and len(str(error)) < 500
        else:
            try_it(option, config)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.per_request], ids=lambda option: option.name)
@given(value=any_value, rate_beside=st.sampled_from([None, 0, 0.5]))
def test_in_a_request(option: Option, value: Any, rate_beside: float | None) -> None:
    server = EVSConfig(rate=0.75, request_overrides="any", encoder="reuse")
    beside = {} if rate_beside is None or option.name == "rate" else {"evs_rate": rate_beside}
    try:
        config = admit(server, {**beside, option.request_key: value})
    except RequestError as error:
        assert is_own_text(option, str(error), value)
    else:
        try_it(option, config)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20] if value != 10**5000 else "10**5000")
def test_each_hard_value_by_each_way(value: Any) -> None:
    for option in OPTIONS:
        for make in (
            lambda option=option: EVSConfig.from_mapping({option.name: value}),
            lambda option=option: EVSConfig(**{option.name: value}),
            lambda option=option: admit(EVSConfig(request_overrides="any"), {option.request_key: value}),
        ):
            try:
                try_it(option, make())
            except EVSError as error:
                # What only the server may set is an unknown key in a request.
                assert is_own_text(option, str(error), value) or "Unknown key" in str(error)


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word[:12] or "nothing")
def test_each_hard_word_of_a_command_line(word: str) -> None:
    for option in OPTIONS:
        try:
            value = option.parse(word)
        except ConfigError as error:
            assert is_own_text(option, str(error), word) and option.allowed in str(error) and len(str(error)) < 500
        else:
            assert option.is_allowed(value) and (option.choices or json.loads(word) == value)


def test_rate_zero_leaves_what_stands_beside_it() -> None:
    server = EVSConfig(rate=0.75, max_tokens=40, request_overrides="any")
    assert not admit(server, {"evs_rate": 0}).active
    capped = admit(server, {"evs_rate": 0, "evs_max_tokens": 300})
    assert capped.active and capped.max_tokens == 300 and not capped.rate
    judged = admit(server, {"evs_rate": 0, "evs_threshold": 6})
    assert judged.active and judged.threshold == 6 and judged.max_tokens is None
