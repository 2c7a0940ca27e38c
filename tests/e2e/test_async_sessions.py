# SPDX-License-Identifier: Apache-2.0
"""vLLM's own way to engine sessions, `AsyncLLM.generate` with an async generator, in processes of its own."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from evs_vllm.errors import RequestError
from evs_vllm.testing import make_model, synthetic_clip
from tests.e2e.harness import TOLERANCE, VIDEO, chat
from tests.e2e.sessions import CLOSE, answered, difference
from tests.families.processing import metadata_for
from tests.reference.hf import Clip, Reference, Settings

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
SIZE = (84, 140)
CONTEXT = 512
LENGTH = 5
SETTINGS = Settings(0.75, selection="learned")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("short") / FAMILY, FAMILY, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def ref(directory):
    return Reference(directory)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(directory, loop):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    evs = {"rate": 0.75, "encoder": "full", "request_overrides": "any"}
    arguments = AsyncEngineArgs(
        str(directory), max_model_len=CONTEXT, max_num_seqs=4, enforce_eager=True, dtype="float32", seed=0,
        additional_config={"evs": evs},
    )  # fmt: skip

    async def start():
        return AsyncLLM.from_engine_args(arguments)

    engine = loop.run(start())
    yield engine
    engine.shutdown()


def inputs(seed, fps=2.0):
    moving, other = (synthetic_clip(8, SIZE, moving=0.3, seed=seed + i) for i in (0, 50))
    clips = []
    for frames in (moving, np.repeat(moving[-1:], 4, axis=0), other):
        clips.append(Clip(frames, fps, SETTINGS, tuple(clips)))
    texts = (chat(VIDEO, "What happens?"), CLOSE + chat("And now? ", VIDEO), CLOSE + chat(VIDEO, "Why?"))
    return [(text, [clip]) for text, clip in zip(texts, clips)]


@pytest.fixture(scope="module")
def plays(ref):
    """Two sessions that the reference answers without a near tie."""
    found = (answered(ref, inputs(seed), LENGTH, evs_stream=True) for seed in range(500, 560))
    some = [turns for _, turns in zip(range(2), filter(None, found))]
    assert len(some) == 2
    return some


def sampling(length=LENGTH):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0, max_tokens=length, logprobs=5, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


class Client:
    """Sends inputs, each once the one before it was answered unless it is in a hurry, and takes the answers."""

    def __init__(self, engine, name, hurry=False, length=LENGTH):
        self.engine, self.name, self.hurry, self.length = engine, name, hurry, length
        self.free, self.answers = asyncio.Event(), [([], [])]

    async def _inputs(self, turns):
        from vllm.engine.protocol import StreamingInput

        before = None
        for turn in turns:
            (prompt,) = await self.engine.renderer.render_cmpl_async([turn.to_vllm(before)])
            before = prompt["mm_hashes"]["video"][-1] if turn.clips else before
            self.free.clear()
            yield StreamingInput(prompt)
            if not self.hurry:
                await self.free.wait()

    async def play(self, turns):
        """All answers, as (tokens, logprobs)."""
        async for output in self.engine.generate(self._inputs(turns), sampling(self.length), self.name):
            (part,) = output.outputs
            tokens, logprobs = self.answers[-1]
            tokens += part.token_ids
            logprobs += part.logprobs
            if part.finish_reason is not None:
                self.answers.append(([], []))
                self.free.set()
        return self.answers[:-1]


def check(answers, turns):
    assert len(answers) == len(turns)
    for (tokens, logprobs), turn in zip(answers, turns):
        assert difference(tokens, logprobs, turn.answer) <= TOLERANCE


def held_by(engine):
    return dict(engine.output_processor.request_states), dict(engine.output_processor.external_req_ids)


def test_two_sessions_at_once(engine, loop, plays):
    async def both():
        return await asyncio.gather(*(Client(engine, f"both-{i}").play(turns) for i, turns in enumerate(plays)))

    for answers, turns in zip(loop.run(both()), plays):
        check(answers, turns)
    assert held_by(engine) == ({}, {})


def test_a_client_that_leaves_does_not_disturb_another(engine, loop, plays):
    """One leaves while it is answered, one between two inputs; the engine holds nothing for them."""
    one, other = plays

    async def leave(client, after):
        task = asyncio.create_task(client.play(one))
        while sum(len(tokens) for tokens, _ in client.answers) < after:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_of_them():
        leaving = [leave(Client(engine, "leaves-early"), 2), leave(Client(engine, "leaves-late"), LENGTH + 2)]
        stays, *_ = await asyncio.gather(Client(engine, "stays").play(other), *leaving)
        return stays

    check(loop.run(all_of_them()), other)
    assert held_by(engine) == ({}, {})
    # Nor does it later: the same once more, from what all have left in the caches.
    check(loop.run(Client(engine, "afterwards").play(one)), one)


class Said:
    """An input that is text alone, whose answer nobody compares."""

    clips = ()

    def __init__(self, text):
        self.text = text

    def to_vllm(self, before):
        return {"prompt": self.text}


@pytest.mark.parametrize("hurry", [False, True])
@pytest.mark.parametrize("length", [LENGTH, None])
def test_a_session_that_runs_out_of_context(engine, loop, ref, hurry, length):
    """It is answered up to there, told why, and does not take the engine with it."""
    text = chat("word ")
    while (size := len(ref.tokenizer(text)["input_ids"])) < 60:
        text = text.replace("word ", "word word ", 1)
    if length is None:  # the first answer takes the whole context, and nothing fits after it
        expected = [CONTEXT - size]
    else:
        fitting = max(n for n in range(CONTEXT) if n * size + (n - 1) * (LENGTH - 1) < CONTEXT)
        taken = fitting * size + (fitting - 1) * (LENGTH - 1)
        expected = [LENGTH] * (fitting - 1) + [min(LENGTH, CONTEXT - taken)]
    client = Client(engine, f"long-{hurry}-{length}", hurry, length)
    words = rf"cannot take in more: it has \d+ tokens .* took in {len(expected)} input"
    with pytest.raises(RequestError, match=words):
        loop.run(client.play([Said(text)] * (len(expected) + 3)))
    tokens = [len(tokens) for tokens, _ in client.answers]
    if hurry:  # vLLM joins what was not read yet, so that it cannot be seen where an answer ends
        assert sum(tokens) == sum(expected)
    else:
        assert tokens == [*expected, 0]
    assert held_by(engine) == ({}, {})


def seconds_after_seconds(ref, fps):
    """Inputs of a few tokens and many seconds each."""
    for seed in range(600, 900, 7):
        clips = []
        for number in range(6):
            frames = synthetic_clip(8, SIZE, moving=0.3, seed=seed + number)
            clips.append(Clip(frames, fps, SETTINGS, tuple(clips)))
        texts = [chat(VIDEO, "What?")] + [CLOSE + chat(VIDEO, "What?")] * 5
        if turns := answered(ref, [(text, [clip]) for text, clip in zip(texts, clips)], LENGTH, evs_stream=True):
            return turns
    raise AssertionError("the reference is nearly tied whatever the clips")


def test_a_session_that_runs_out_of_position_ids(engine, loop, ref):
    """What fits is answered rightly up to the end of the rotary table."""
    from evs_vllm.engine.limits import RESERVE

    limit = 4 * CONTEXT
    turns = seconds_after_seconds(ref, fps=0.05)
    ends = [turn.answer.following for turn in turns]
    fitting = sum(end + RESERVE < limit for end in ends)
    assert 2 <= fitting < len(turns) and len(turns[fitting].answer.prompt_ids) < CONTEXT, ends
    client = Client(engine, "far")
    with pytest.raises(RequestError, match=rf"position IDs then, .* the model has {limit}; evs_positions 'sequential'"):
        loop.run(client.play(turns))
    check(client.answers[:-1], turns[:fitting])
    assert client.answers[-1] == ([], []) and held_by(engine) == ({}, {})
    check(loop.run(Client(engine, "near").play(turns[:1])), turns[:1])


def test_a_video_that_nobody_knows(engine, loop, plays):
    async def ask(**kwargs):
        prompt = plays[0][0].to_vllm(None)
        await engine.renderer.render_cmpl_async([prompt | {"mm_processor_kwargs": {"evs_stream": True, **kwargs}}])

    with pytest.raises(RequestError, match="evs_after names the video 'nobody', and what it left"):
        loop.run(ask(evs_after="nobody"))
    with pytest.raises(RequestError, match="that is so in a stream alone"):
        loop.run(ask(evs_after="nobody", evs_stream=False))
    loop.run(ask(evs_after=None))


def test_the_example_of_the_documentation(engine, loop):
    (code,) = re.findall(r"```python\n(import asyncio.*?)```", (ROOT / "docs/live-video.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    moving = synthetic_clip(8, SIZE, moving=0.3, seed=1)
    chunks = [moving, np.repeat(moving[-1:], 8, axis=0), moving[::-1].copy()]

    async def camera():
        for frames in chunks:
            yield frames, metadata_for(frames)

    async def collect():
        return [answer async for answer in names["watch"](engine, camera(), "What happens?")]

    answers = loop.run(collect())
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    assert held_by(engine) == ({}, {})
