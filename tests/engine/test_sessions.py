# SPDX-License-Identifier: Apache-2.0
"""Which inputs a session takes in, without an engine: sums of made-up prompts, clips and answers."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evs_vllm.engine.limits import RESERVE
from evs_vllm.engine.plan_field import PrunedRange
from evs_vllm.engine.sessions import Session, admit_input
from evs_vllm.errors import RequestError

pytestmark = pytest.mark.vllm

CONTEXT, IDS = 400, 512


class Engine:
    """What is read of vLLM's `AsyncLLM`, with one session."""

    def __init__(self, cache: str = "lru") -> None:
        text = SimpleNamespace(max_position_embeddings=IDS)
        self.model_config = SimpleNamespace(
            architecture="LlavaNextVideoForConditionalGeneration",
            hf_config=SimpleNamespace(get_text_config=lambda: text),
            max_model_len=CONTEXT,
            multimodal_config=SimpleNamespace(mm_processor_cache_type=cache),
        )
        self.state = SimpleNamespace(input_chunk_queue=None, detokenizer=SimpleNamespace(num_output_tokens=lambda: 0))
        self.output_processor = SimpleNamespace(request_states={})
        self.collector = SimpleNamespace(output=None)
        self.forgotten: list[str] = []
        cached = SimpleNamespace(invalidate=self.forgotten.append)
        self.renderer = SimpleNamespace(mm_processor_cache=cached)

    def send(self, tokens: int, extra: int = 0, most: int = 64) -> Any:
        clips = [SimpleNamespace(mm_position=PrunedRange(0, 1, None, extra), mm_hash="clip")] if extra else None
        sampling = SimpleNamespace(max_tokens=most)
        request = SimpleNamespace(
            request_id="one", prompt_token_ids=[1] * tokens, mm_features=clips, sampling_params=sampling
        )
        return admit_input(self, request, self.collector)

    def says(self, tokens: int, answered: bool = True) -> None:
        """So many tokens were generated in the session so far; an input is being answered, or not."""
        self.output_processor.request_states["one"] = self.state
        self.state.detokenizer.num_output_tokens = lambda: tokens
        self.state.input_chunk_queue = None if answered else []


@pytest.mark.parametrize("cache", ["lru", "shm"])
def test_sums_of_a_session(cache: str) -> None:
    """Against the rule in plain words, for sessions of any inputs and answers."""
    rng = np.random.default_rng()
    refused = {"tokens": 0, "positions": 0}
    for _ in range(200):
        engine, tokens, extra, generated, inputs = Engine(cache), 0, 0, 0, 0
        while True:
            new, more = int(rng.integers(1, 80)), int(rng.integers(0, 60)) * int(rng.integers(0, 2))
            length = tokens + new + generated - inputs  # of each answer the last token is dropped
            far = (CONTEXT if cache == "shm" else length) + extra + more
            too_long, too_far = length >= CONTEXT, bool(extra + more) and far + RESERVE + 1 > IDS
            if too_long or too_far:
                refused["tokens" if too_long else "positions"] += 1
                why = f"it has {length} tokens then" if too_long else f"take up {far} position IDs then"
                with pytest.raises(RequestError, match=f"{why}.* took in {inputs} input.*Begin a new session"):
                    asyncio.run(engine.send(new, more))
                assert engine.forgotten == ["clip"] * bool(more), "vLLM would take it for sent"
                break
            asyncio.run(engine.send(new, more))
            tokens, extra, inputs = tokens + new, extra + more, inputs + 1
            generated += int(rng.integers(1, 40))
            engine.says(generated)
    assert min(refused.values()) > 10


def test_an_input_waits_where_the_answer_might_get_too_long() -> None:
    async def play() -> list[str]:
        engine = Engine()
        events: list[str] = []
        await engine.send(100, most=200)
        engine.says(3, answered=False)
        await asyncio.wait_for(engine.send(50, most=100), 1)  # fits whatever is answered
        session: Session = engine.collector._evs_session
        assert (session.inputs, session.tokens, session.answers) == (2, 150, 300)

        async def next_one() -> None:
            await engine.send(100, most=10)
            events.append("taken")

        task = asyncio.create_task(next_one())
        await asyncio.sleep(0.05)
        events.append("waits")
        engine.says(40)
        await asyncio.wait_for(task, 1)
        assert (session.inputs, session.tokens, session.answers) == (3, 250, 40 - 2 + 10)
        # What was answered is read before the refusal takes its place.
        engine.says(44)
        engine.collector.output = "the end of an answer"
        task = asyncio.create_task(engine.send(200))
        await asyncio.sleep(0.05)
        assert not task.done()
        engine.collector.output = None
        with pytest.raises(RequestError, match="250 tokens and 41 of answers"):
            await asyncio.wait_for(task, 1)
        return events

    assert asyncio.run(play()) == ["waits", "taken"]


def test_a_session_that_is_gone_waits_for_nothing() -> None:
    async def play() -> None:
        engine = Engine()
        await engine.send(100, most=390)
        engine.says(3, answered=False)
        task = asyncio.create_task(engine.send(100))
        await asyncio.sleep(0.03)
        engine.output_processor.request_states.clear()
        with pytest.raises(RequestError, match="cannot take in more"):
            await asyncio.wait_for(task, 1)

    asyncio.run(play())
