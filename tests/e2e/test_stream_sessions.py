# SPDX-License-Identifier: Apache-2.0
"""Engine sessions with video: chunk after chunk into one request, as the reference answers all of them at once."""

from itertools import count

import numpy as np
import pytest

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import VIDEO, Request, chat, recorded_positions
from tests.e2e.sessions import CLOSE, Session, answer, answered, held_by, step
from tests.families.registry import FAMILIES
from tests.reference.hf import Clip, Settings

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
SIZE = (84, 140)
BLOCK = FAMILIES[FAMILY].facts.block_size
LENGTH = 5
names = map("session-{}".format, count())


@pytest.fixture
def engine(engines):
    # As in test_streams.py, so that both use one engine.
    evs = {"rate": 0.75, "encoder": "full", "request_overrides": "any"}
    return engines.get(FAMILY, None, additional_config={"evs": evs}, enable_prefix_caching=True, block_size=BLOCK)


def inputs(seed, settings, stream):
    """Something moves; it stands still; a question without video; two videos in one input, the first in one unit."""
    moving, other = (synthetic_clip(8, SIZE, moving=0.3, seed=seed + i) for i in (0, 50))
    clips = []
    for frames in (moving, np.repeat(moving[-1:], 8, axis=0), np.repeat(moving[-1:], 2, axis=0), other):
        clips.append(Clip(frames, settings=settings, after=tuple(clips) if stream else None))
    return [
        (chat(VIDEO, "What happens?"), clips[:1]),
        (CLOSE + chat("And now? ", VIDEO), clips[1:2]),
        (CLOSE + chat("Are you sure?"), []),
        (CLOSE + chat(VIDEO, "Compare. ", VIDEO, "Why?"), clips[2:]),
    ]


def session_of(ref, stream=True, positions="keep", seeds=range(300, 340), **kwargs):
    """The first one that the reference answers without a near tie."""
    settings = Settings(0.75, selection="learned", positions=positions)
    for seed in seeds:
        asked = {"evs_stream": stream, "evs_positions": positions, **kwargs}
        if turns := answered(ref, inputs(seed, settings, stream), LENGTH, **asked):
            return turns
    raise AssertionError("the reference is nearly tied whatever the clips")


@pytest.mark.parametrize("positions", ["keep", "sequential"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_session_is_one_prompt_to_the_model(engine, reference, stream, positions):
    """Tokens, logprobs and position IDs; an input costs its own tokens alone, whatever came before."""
    turns = session_of(reference(FAMILY), stream, positions)
    session, computed = Session(engine, next(names), chained=stream), 0
    for turn in turns:
        with recorded_positions(engine) as seen:
            session.add(turn)
            answer(engine, [session])
        session.check(turn)
        (_, prefill), *decoding = seen
        np.testing.assert_array_equal(prefill, turn.answer.positions[:, computed:])
        for number, (_, ids) in enumerate(decoding[: LENGTH - 1]):
            assert ids[:, 0].tolist() == [turn.answer.following + number] * 3
        # The last token of an answer is dropped.
        computed = len(turn.answer.prompt_ids) + LENGTH - 1
    session.close()
    counted = turns[-1].answer.following == len(turns[-1].answer.prompt_ids)
    assert counted == (positions == "sequential")
    kept = [len(indices) for indices in turns[-1].answer.kept]
    assert (kept[2] == 1) == stream, "of a chunk that shows nothing new one token stays"


def test_two_sessions_and_a_request_between(engine, reference):
    """Inputs in any order beside each other; one client waits for no answer."""
    ref = reference(FAMILY)
    slow, hasty = session_of(ref), session_of(ref, seeds=range(340, 380))
    other = session_of(ref, False, seeds=range(380, 400))[:1]
    one, two, single = (Session(engine, next(names)) for _ in range(3))
    for turn in hasty:
        two.add(turn)
    for number, turn in enumerate(slow):
        one.add(turn)
        if number == 1:
            single.add(other[0])
        answer(engine, [one, two, single])
        one.check(turn)
    tokens, logprobs = two.take()
    for number, turn in enumerate(hasty):
        two.tokens, two.logprobs = (part[LENGTH * number :][:LENGTH] for part in (tokens, logprobs))
        two.check(turn)
    single.check(other[0])
    for session in (one, two, single):
        session.close()
    assert not any(map(bool, [v for k, v in held_by(engine).items() if k != "queues"])), held_by(engine)


def test_a_session_that_is_cancelled_leaves_nothing(engine, reference):
    """While it answers, while it waits for its next input, and with inputs that nobody has looked at yet."""
    turns = session_of(reference(FAMILY))
    nothing = {key: value for key, value in held_by(engine).items() if key != "runner"}
    assert not any(nothing[key] for key in nothing if key != "queues") and nothing["queues"] == [0, 0, 0]
    stays = Session(engine, next(names))
    store = engine.llm.llm_engine.renderer.mm_processor._evs_store
    entries = len(store)
    for number, turn in enumerate(turns):
        goes = Session(engine, next(names))
        stays.add(turn)
        goes.add(turns[0])
        if number == 1:
            answer(engine, [stays, goes])  # both wait for their next input
        elif number == 2:
            goes.add(turns[1])
            goes.add(turns[2])
        step(engine, [stays, goes])
        step(engine, [stays, goes])
        engine.llm.llm_engine.abort_request([goes.name], internal=False)
        answer(engine, [stays])
        stays.check(turn)
        held = held_by(engine)
        assert held["requests"] == held["outputs"] == held["names"] == [stays.name]
    stays.close()
    step(engine, [])
    assert {key: value for key, value in held_by(engine).items() if key != "runner"} == nothing
    assert held_by(engine)["runner"] == []
    assert len(store) - entries <= 4, "five sessions leave for later ones what one of them leaves"


def test_the_same_beginning_keeps_the_same_tokens(engine, reference):
    """A second session, with what the first left in every cache and with nothing, and a chat of the same videos."""
    turns = session_of(reference(FAMILY))

    def play():
        session = Session(engine, next(names))
        sent = []
        for turn in turns:
            # Now: the engine core adds to the first input's list what comes later.
            sent.append([(f.identifier, f.mm_position.length) for f in session.add(turn).mm_features or ()])
            answer(engine, [session])
            session.check(turn)
        session.close()
        return sent

    first = play()
    assert play() == first
    engine.reset()
    assert play() == first
    request = Request(VIDEO * 4, [clip for turn in turns for clip in turn.clips], {"evs_stream": True})
    (rendered,) = engine.llm.llm_engine.renderer.render_cmpl([request.to_vllm()])
    lengths = [place.length for place in rendered["mm_placeholders"]["video"]]
    assert [*zip(rendered["mm_hashes"]["video"], lengths)] == [clip for clips in first for clip in clips]
