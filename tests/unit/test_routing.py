# SPDX-License-Identifier: Apache-2.0
"""Which requests share cached work, by what is in them."""

from typing import Any

from evs_vllm.serving.routing import prefix_chain, routing_key

VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
OTHER = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,BBBB"}}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asked(*content: Any, before: Any = (), **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [*before, {"role": "user", "content": list(content)}], **more}


def shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many links two requests have in common, which are the first ones of both."""
    mine, yours = prefix_chain(one), prefix_chain(other)
    count = sum(a == b for a, b in zip(mine, yours))
    assert mine[:count] == yours[:count] and not set(mine[count:]) & set(yours[count:])
    return count


def test_links_are_shared_as_far_as_contents_are_alike() -> None:
    first = asked(VIDEO, text("What moves?"))
    assert len(prefix_chain(first)) == 3
    assert shared(first, asked(VIDEO, text("What moves?"))) == 3
    assert shared(first, asked(VIDEO, text("Why?"))) == 2
    assert shared(first, asked(OTHER, text("What moves?"))) == 1
    assert shared(first, asked(text("What moves?"), VIDEO)) == 1
    assert shared(first, asked(VIDEO, text("What moves?"), before=[SYSTEM])) == 1
    assert shared(first, {**first, "messages": [{**first["messages"][0], "role": "system"}]}) == 1


def test_what_the_contents_become_depends_on_the_settings() -> None:
    first = asked(VIDEO)
    for more in (
        {"model": "tuned"},
        {"mm_processor_kwargs": {"evs_rate": 0.9}},
        {"mm_processor_kwargs": {"max_pixels": 784}},
        {"media_io_kwargs": {"video": {"num_frames": 8}}},
        {"cache_salt": "x"},
    ):
        assert shared(first, asked(VIDEO, **more)) == 0, more
    assert shared(first, asked(VIDEO, temperature=1, max_tokens=3, stream=True)) == 2
    kwargs = {"evs_rate": 0.9, "evs_positions": "keep"}
    reordered = dict(reversed(kwargs.items()))
    assert shared(asked(VIDEO, mm_processor_kwargs=kwargs), asked(VIDEO, mm_processor_kwargs=reordered)) == 2


def test_turns_of_a_conversation_have_one_key() -> None:
    first = asked(VIDEO, text("What moves?"), before=[SYSTEM])
    answer = {"role": "assistant", "content": "A square."}
    second = {**first, "messages": [*first["messages"], answer, {"role": "user", "content": [OTHER, text("And now?")]}]}
    assert routing_key(first) == routing_key(second) == routing_key(asked(VIDEO, text("Why?"), before=[SYSTEM]))
    assert routing_key(first) != routing_key(asked(OTHER, text("What moves?"), before=[SYSTEM]))


def test_keys_of_texts() -> None:
    first = {"model": "m", "messages": [SYSTEM, {"role": "user", "content": "Hello"}]}
    more = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    assert routing_key(first) == routing_key({**first, "messages": [*first["messages"], *more]})
    assert routing_key(first) != routing_key({**first, "messages": [SYSTEM, {"role": "user", "content": "Bye"}]})
    assert routing_key({"model": "m", "messages": []}) == routing_key({"model": "m"})
