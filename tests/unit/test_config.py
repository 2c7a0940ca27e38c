# SPDX-License-Identifier: Apache-2.0
"""Options: parsing, refusals, request overrides, and what 'stricter' promises."""

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.errors import ConfigError, EVSError, RequestError
from evs_vllm.options import OPTIONS, Option, exact
from evs_vllm.requests import admit, split_request_kwargs

GOOD = {
    "rate": [0, 0.0, 0.5, 0.999],
    "threshold": [0, 5, 7.5, 255],
    "selection": ["learned", "contrast", "paper"],
    "budget": ["clip", "causal"],
    "focus": [((0, 2, 4),), ((1.5, 2.5, 0), (0, 10**6, 0.25))],
    "positions": ["keep", "sequential"],
    "min_tokens_per_unit": [0, 1, 100],
    "max_tokens": [1, 4096],
    "encoder": ["auto", "reuse", "full"],
    "encoder_refresh": [0, 4, 35.5, 255],
    "request_overrides": ["none", "stricter", "any"],
    "stream": [True, False],
    "stream_cache_gb": [0, 0.25, 1024],
    "processor_threads": [1, 4, 1024],
}
BAD = {
    "rate": [1, -0.1, 1.5, math.nan, math.inf, True, "0.5", [0.5], {}],
    "threshold": [-1, 255.5, math.nan, -math.inf, False, "6"],
    "selection": ["", "Paper", "embedding", 0, True, None, ["paper"]],
    "budget": ["", "Causal", "stream", 1, True, None, ["clip"]],
    "focus": [
        [],
        [[0, 1]],
        [[0, 0, 1]],
        [[-1, 2, 1]],
        [[0, 1, 65]],
        [[0, 1, -1]],
        [[0, math.inf, 1]],
        [[0, 1, True]],
        "0-2",
        5,
    ],
    "positions": ["", "Keep", 1, True, ["keep"]],
    "min_tokens_per_unit": [-1, 1.0, True, "1", None],
    "max_tokens": [0, -5, 2.0, True, "7"],
    "encoder": ["none", "", True, None],
    "encoder_refresh": [-1, 255.5, math.nan, True, None, "35"],
    "request_overrides": ["all", "", 0, None],
    "stream": [1, 0, "true", "", None, [True]],
    "stream_cache_gb": [-0.1, 1025, math.nan, True, "1", None],
    "processor_threads": [0, -1, 1025, 2.0, True, "2"],
}


def test_tables_cover_every_option() -> None:
    assert set(GOOD) == set(BAD) == {option.name for option in OPTIONS} == set(EVSConfig().to_mapping())


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_good_values(name: str, value: object) -> None:
    assert getattr(EVSConfig.from_mapping({name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values_say_what_is_allowed(name: str, value: object) -> None:
    option = next(o for o in OPTIONS if o.name == name)
    with pytest.raises(ConfigError) as error:
        EVSConfig.from_mapping({name: value})
    assert name in str(error.value) and repr(value) in str(error.value) and option.allowed in str(error.value)


@pytest.mark.parametrize("bad", [None, 0.75, "rate=0.75", ["rate"]])
def test_options_must_be_a_mapping(bad: object) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        EVSConfig.from_mapping(bad)  # type: ignore[arg-type]


def test_unknown_and_contradicting_options() -> None:
    with pytest.raises(ConfigError, match=r"Unknown evs option\(s\) rates; known: rate, threshold"):
        EVSConfig.from_mapping({"rates": 0.5})
    with pytest.raises(ConfigError, match="contradict"):
        EVSConfig(rate=0.5, threshold=6)
    assert EVSConfig(rate=0, threshold=6).active
    with pytest.raises(ConfigError, match="budget=causal and max_tokens=9 alone"):
        EVSConfig(budget="causal", max_tokens=9)
    assert EVSConfig(budget="causal", max_tokens=9, threshold=6).active and not EVSConfig(budget="causal").active


def test_command_line_words() -> None:
    by_name = {o.name: o for o in OPTIONS}
    assert by_name["rate"].parse("0.75") == 0.75
    assert by_name["max_tokens"].parse("100") == 100
    assert by_name["positions"].parse("keep") == "keep"
    assert by_name["selection"].parse("contrast") == "contrast"
    for name, word in [("rate", "1"), ("rate", "x"), ("rate", "NaN"), ("max_tokens", "1.5"), ("selection", "k")]:
        with pytest.raises(ConfigError, match=by_name[name].flag):
            by_name[name].parse(word)


def test_rate_is_read_as_a_decimal() -> None:
    assert exact(0.9) == Fraction(9, 10) and exact(1e-05) == Fraction(1, 100000)
    # Binary floats say 100 * (1 - 0.9) = 9.999...
    assert token_budget(10, 10, EVSConfig(rate=0.9), stock_count=True) == 10
    # 9 * 10 * (1 - 0.9) / 2 is 4.4999... in binary and 4.5 in decimals; 19 * 10 * (1 - 0.9) is 18.999... and 19.
    assert token_budget(10, 10, EVSConfig(rate=0.9)) == 10 + 5
    assert token_budget(41, 10, EVSConfig(rate=0.9)) == 41


def test_identity_tells_settings_apart_and_spellings_not() -> None:
    assert EVSConfig(rate=0.5).identity == EVSConfig(rate=0.50, request_overrides="any").identity
    refreshed = EVSConfig(rate=0.5, encoder="full", encoder_refresh=3)
    assert refreshed.identity == EVSConfig(rate=0.5, encoder="full").identity, "nothing to refresh in a full tower"
    assert EVSConfig(threshold=6).identity == EVSConfig(threshold=6.0, rate=0).identity
    different = [
        EVSConfig(),
        EVSConfig(rate=0.5),
        EVSConfig(rate=0.75),
        EVSConfig(threshold=0.5),
        EVSConfig(threshold=0.5, selection="contrast"),
        EVSConfig(rate=0.5, selection="contrast"),
        EVSConfig(rate=0.5, selection="paper"),
        EVSConfig(rate=0.5, budget="causal"),
        EVSConfig(rate=0.5, positions="sequential"),
        EVSConfig(rate=0.5, min_tokens_per_unit=1),
        EVSConfig(rate=0.5, max_tokens=1),
        EVSConfig(rate=0.5, encoder="full"),
        EVSConfig(rate=0.5, encoder="reuse"),
        EVSConfig(rate=0.5, encoder="reuse", encoder_refresh=2),
        EVSConfig(rate=0.5, encoder="reuse", encoder_refresh=0),
    ]
    assert len({config.identity for config in different}) == len(different)
    assert EVSConfig(rate=0, positions="sequential").identity == EVSConfig(selection="paper").identity == ""
    assert EVSConfig(rate=0.5).identity == EVSConfig(rate=0.5, selection="learned").identity
    assert all(f"selection={config.selection}" in config.identity for config in different if config.active)


OTHER = {
    "rate": 0.75, "threshold": 9, "selection": "paper", "positions": "sequential", "min_tokens_per_unit": 3,
    "max_tokens": 77, "encoder": "full", "encoder_refresh": 3, "request_overrides": "any",
    "focus": ((0, 1, 4),), "budget": "causal", "stream": True, "stream_cache_gb": 1, "processor_threads": 3,
}  # fmt: skip
"""For each option a value that differs from that of `_BASE`."""
_BASE = EVSConfig(threshold=6, encoder="reuse", selection="paper")
# A rate contradicts a threshold, and thresholds of two selections cannot be compared.
_BASES = dict.fromkeys(["rate", "selection", "focus"], EVSConfig(rate=0.5, encoder="reuse"))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_what_shapes_a_clip_is_in_the_identity(option: Option) -> None:
    """A new option without a value here fails; one that shapes a clip cannot share its cache entries."""
    base = _BASES.get(option.name, _BASE)
    other = replace(base, **{option.name: OTHER[option.name]})
    assert (other.identity != base.identity) == bool(option.affects)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_request_may_have_what_the_server_has(option: Option) -> None:
    base = _BASES.get(option.name, _BASE)
    other = replace(base, **{option.name: OTHER[option.name]})
    assert base.is_at_most(base) and other.is_at_most(other)
    if option.name == "budget":
        # The causal one may owe a unit, and may lack later what it spent: neither is bounded by the other.
        assert not base.is_at_most(other) and not other.is_at_most(base)
    elif option.no_more is None:
        assert base.is_at_most(other) and other.is_at_most(base)
    else:
        assert base.is_at_most(other) != other.is_at_most(base), "the two values cost the same"


@pytest.mark.parametrize(
    ("server", "request_kwargs", "expected"),
    [
        (EVSConfig(rate=0.5), {"evs_rate": 0.9}, EVSConfig(rate=0.9)),
        (EVSConfig(rate=0.5), {"evs_rate": 0.5}, EVSConfig(rate=0.5)),
        (EVSConfig(rate=0.5), {"evs_positions": "sequential"}, EVSConfig(rate=0.5, positions="sequential")),
        (EVSConfig(rate=0.5), {"evs_max_tokens": 9}, EVSConfig(rate=0.5, max_tokens=9)),
        (EVSConfig(rate=0), {"evs_threshold": 3}, EVSConfig(threshold=3)),
        (EVSConfig(threshold=3, selection="paper"), {"evs_threshold": 4}, EVSConfig(threshold=4, selection="paper")),
        (EVSConfig(threshold=3), {"evs_threshold": 3.0}, EVSConfig(threshold=3)),
        (EVSConfig(rate=0.5), {"evs_selection": "paper"}, EVSConfig(rate=0.5, selection="paper")),
        (EVSConfig(rate=0.5), {"evs_selection": "contrast"}, EVSConfig(rate=0.5, selection="contrast")),
        (EVSConfig(rate=0.5, selection="contrast"), {"evs_selection": "learned"}, EVSConfig(rate=0.5)),
        (EVSConfig(max_tokens=9), {"evs_threshold": 4}, EVSConfig(max_tokens=9, threshold=4)),
        (
            EVSConfig(threshold=3, request_overrides="any"),
            {"evs_selection": "paper", "evs_rate": 0.5},
            EVSConfig(rate=0.5, selection="paper", request_overrides="any"),
        ),
        (
            EVSConfig(threshold=3, request_overrides="any"),
            {"evs_selection": "paper", "evs_threshold": 3},
            EVSConfig(threshold=3, selection="paper", request_overrides="any"),
        ),
        (
            EVSConfig(threshold=3, request_overrides="any"),
            {"evs_rate": 0.1},
            EVSConfig(rate=0.1, request_overrides="any"),
        ),
    ],
)
def test_overrides(server: EVSConfig, request_kwargs: dict[str, object], expected: EVSConfig) -> None:
    assert admit(server, request_kwargs) == expected


REUSE = EVSConfig(rate=0.5).resolve_encoder("")


def test_encoder_is_resolved_at_start() -> None:
    assert REUSE.encoder == "reuse" and EVSConfig(encoder="full").resolve_encoder("").encoder == "full"
    assert EVSConfig().resolve_encoder("no tower.").encoder == "full"
    with pytest.raises(ConfigError, match=r"not possible here: no tower"):
        EVSConfig(encoder="reuse").resolve_encoder("no tower.")
    assert "why_not_reuse" not in EVSConfig().to_mapping()


@pytest.mark.parametrize(
    ("server", "request_kwargs", "admitted"),
    [
        (REUSE, {"evs_encoder": "auto", "evs_rate": 0.6}, True),
        (REUSE, {"evs_encoder": "full"}, False),
        (replace(REUSE, encoder="full"), {"evs_encoder": "reuse"}, True),
        (REUSE, {"evs_encoder_refresh": 4}, False),
        (replace(REUSE, encoder_refresh=0), {"evs_encoder_refresh": 255}, False),
        (replace(REUSE, encoder_refresh=4), {"evs_encoder_refresh": 8}, True),
        (replace(REUSE, encoder_refresh=4), {"evs_encoder_refresh": 0}, True),
        (replace(REUSE, encoder_refresh=4), {"evs_encoder_refresh": 3}, False),
        (EVSConfig().resolve_encoder("no tower."), {"evs_rate": 0.5, "evs_encoder": "reuse"}, False),
    ],
)
def test_a_request_cannot_make_the_tower_compute_more(
    server: EVSConfig, request_kwargs: dict[str, object], admitted: bool
) -> None:
    if admitted:
        effective = admit(server, request_kwargs)
        assert effective.encoder in ("reuse", "full")
    else:
        with pytest.raises(RequestError):
            admit(server, request_kwargs)


STREAM = {"evs_stream": True}


@pytest.mark.parametrize(
    ("server", "request_kwargs", "admitted"),
    [
        (EVSConfig(rate=0.5), STREAM, True),
        (EVSConfig(rate=0.5), STREAM | {"evs_rate": 0.9}, True),
        (EVSConfig(max_tokens=50), STREAM, True),
        (EVSConfig(threshold=5, selection="paper"), STREAM, True),
        (EVSConfig(threshold=5), STREAM, False),
        (EVSConfig(rate=0.5, stream=True), STREAM, True),
        (EVSConfig(rate=0.5, stream=True), {"evs_stream": False}, False),
        (EVSConfig(rate=0.5, stream=True), {"evs_positions": "sequential"}, True),
        (EVSConfig(rate=0.5, stream=True), {"evs_rate": 0.9}, False),
        (EVSConfig(rate=0.5, focus=((0, 1, 2),)), STREAM, False),
    ],
)
def test_who_may_have_a_stream(server: EVSConfig, request_kwargs: dict[str, object], admitted: bool) -> None:
    if admitted:
        assert admit(server, request_kwargs).stream
    else:
        with pytest.raises(RequestError, match="could cost more|contradict"):
            admit(server, request_kwargs)


@pytest.mark.parametrize("overrides", ["none", "stricter", "any"])
def test_who_may_go_on_from_an_earlier_request(overrides: str) -> None:
    """It changes no setting, so every server takes it where the request is a stream."""
    server = EVSConfig(rate=0.5, stream=True, request_overrides=overrides)
    assert admit(server, {"evs_after": "a video"}) is server
    assert admit(server, {"evs_after": None}) is server
    assert admit(EVSConfig(rate=0.5), STREAM | {"evs_after": "x" * 1024}).stream
    for bad in ("", "x" * 1025, 7, True, ["a video"], {"a": "video"}):
        with pytest.raises(RequestError, match="evs_after got .* a string of 1 to 1024 characters"):
            admit(server, {"evs_after": bad})
    for alone in (EVSConfig(rate=0.5), EVSConfig(stream=True)):
        with pytest.raises(RequestError, match="evs_after .* in a stream alone"):
            admit(alone, {"evs_after": "a video"})
    with pytest.raises(RequestError, match="keys that a request may set: .*, evs_after"):
        admit(server, {"evs_afterwards": 1})


def test_rate_zero_turns_everything_off() -> None:
    server = EVSConfig(threshold=3, max_tokens=100, min_tokens_per_unit=2, request_overrides="any")
    assert not admit(server, {"evs_rate": 0}).active


@pytest.mark.parametrize(
    ("server", "request_kwargs", "words"),
    [
        (EVSConfig(rate=0.5), {"evs_rate": 0.4}, "evs-request-overrides any"),
        (EVSConfig(rate=0.5), {"evs_rate": 0}, "evs-request-overrides any"),
        (EVSConfig(rate=0.5), {"evs_threshold": 255}, "could cost more"),
        (EVSConfig(threshold=5), {"evs_rate": 0.99}, "could cost more"),
        (EVSConfig(rate=0.5, selection="paper"), {"evs_selection": "learned"}, "could cost more"),
        (EVSConfig(rate=0.5, selection="paper"), {"evs_selection": "contrast", "evs_rate": 0.9}, "could cost more"),
        (EVSConfig(threshold=5), {"evs_selection": "paper", "evs_threshold": 255}, "could cost more"),
        (EVSConfig(threshold=5), {"evs_threshold": 6}, "could cost more"),
        (
            EVSConfig(threshold=5, request_overrides="any"),
            {"evs_selection": "paper"},
            "the server's threshold 5 is one of selection 'learned' and means nothing to 'paper'. "
            "Set evs_threshold or evs_rate as well",
        ),
        (EVSConfig(rate=0.5), {"evs_selection": "best"}, "evs_selection got 'best'; allowed: learned or contrast or"),
        (EVSConfig(rate=0.5), {"evs_min_tokens_per_unit": 1}, "could cost more"),
        (EVSConfig(rate=0.5, max_tokens=5), {"evs_max_tokens": 6}, "could cost more"),
        (EVSConfig(rate=0.5, request_overrides="none"), {"evs_rate": 0.9}, "takes no evs"),
        (EVSConfig(rate=0.5), {"evs_rat": 0.9}, "Unknown key.*evs_rat; .*evs_rate"),
        (EVSConfig(rate=0.5), {"evs_request_overrides": "any"}, "Unknown key"),
        (EVSConfig(rate=0.5), {"evs_rate": "0.9"}, "evs_rate got '0.9'; allowed"),
        (EVSConfig(rate=0.5), {"evs_rate": 0.9, "evs_threshold": 9}, "contradict"),
        (EVSConfig(rate=0.5), {"evs_min_tokens_per_unit": None}, "evs_min_tokens_per_unit got None"),
    ],
)
def test_refused_overrides(server: EVSConfig, request_kwargs: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        admit(server, request_kwargs)


configs = st.builds(
    lambda budget, positions, least, most: EVSConfig(
        **budget, positions=positions, min_tokens_per_unit=least, max_tokens=most
    ),
    st.one_of(
        st.just({}),
        st.floats(0, 0.99).map(lambda q: {"rate": q}),
        st.integers(0, 255).map(lambda tau: {"threshold": tau}),
    ),
    st.sampled_from(["keep", "sequential"]),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(1, 60)),
)


@given(configs, st.dictionaries(st.text(max_size=8).map(lambda s: "evs_" + s), st.integers() | st.text() | st.none()))
def test_any_garbage_is_one_of_our_errors(config: EVSConfig, garbage: dict[str, object]) -> None:
    try:
        admit(config, garbage)
    except EVSError as error:
        assert str(error)


def test_split() -> None:
    assert split_request_kwargs({"evs_rate": 1, "fps": 2}) == ({"evs_rate": 1}, {"fps": 2})
    assert split_request_kwargs(None) == ({}, {})


def test_config_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, evs_vllm.config, evs_vllm.families; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
