# SPDX-License-Identifier: Apache-2.0
"""Chunks, turns, the mailbox and the conversation."""

import base64
import json
import random
import threading
import time

import pytest

from evs_vllm.errors import EVSError
from evs_vllm.live.chat import Conversation
from evs_vllm.live.chunks import Chunk, Chunker, Turn
from evs_vllm.live.mailbox import Mailbox, read_into
from evs_vllm.live.source import Frame


def frames(ticks, size=(4, 4)):
    return [Frame(tick, size, f"frame {tick}".encode()) for tick in ticks]


def ticks_of(chunk):
    kind, _, data = chunk.url.partition(";base64,")
    assert kind == "data:video/jpeg"
    return [int(base64.b64decode(part).split()[1]) for part in data.split(",")]


def cut(ticks, *arguments):
    return [[ticks_of(c) for c in turn.chunks] for turn in Chunker(*arguments).turns(frames(ticks))]


def turn(number, seconds=4.0):
    start = number * seconds
    return Turn((Chunk(start, start + seconds, 8, f"data:video/jpeg;base64,{number}"),))


# chunks


def test_a_chunk_a_turn():
    assert cut(range(20), 2, 4) == [[list(range(8))], [list(range(8, 16))], [[16, 17, 18, 19]]]
    (first, *_), *_ = [t.chunks for t in Chunker(2, 4).turns(frames(range(20)))]
    assert (first.start, first.stop, first.frames) == (0, 4, 8)


def test_turns_of_several_chunks_of_pairs_of_frames():
    assert cut(range(10), 2, 2, 5) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]
    assert cut(range(9), 2, 4, 4.5) == [[[0, 1, 2, 3], [4, 5, 6, 7, 8]]]
    assert cut(range(7), 2, 3.5) == [[[0, 1, 2, 3, 4, 5, 6]]], "as long as it was asked for"
    assert cut(range(8), 2, 4, 2) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert cut(range(3), 1, 2, 3) == [[[0, 1, 2]]], "not 2 and 1"


def test_gaps_and_other_sizes_begin_a_chunk_and_single_frames_are_skipped():
    assert cut([0, 1, 2, 5, 6, 7], 2, 4) == [[[0, 1, 2], [5, 6, 7]]]
    assert cut([0, 1, 2, 3, 5, 8, 9], 2, 4) == [[[0, 1, 2, 3]], [[8, 9]]]
    (only,) = Chunker(2, 4).turns(frames([0, 1, 2, 3, 5]))
    assert only.skipped == 1 and only.frames == 4
    mixed = [*frames([0, 1, 2]), *frames([3, 4], size=(4, 6)), *frames([5, 6, 7])]
    (only,) = Chunker(2, 4).turns(mixed)
    assert [ticks_of(c) for c in only.chunks] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert not list(Chunker(2, 4).turns(frames([3])))
    # Of turns with no chunk at all, the next one says it.
    alone = list(Chunker(2, 4).turns(frames([0, 8, 16, 24, 25, 26])))
    assert [(turn.frames, turn.skipped) for turn in alone] == [(3, 3)]


def test_a_turn_is_there_with_its_last_frame():
    source = iter(frames(range(100)))
    turns = Chunker(2, 4).turns(source)
    next(turns)
    assert next(source).tick == 8


def test_where_chunks_end_depends_on_no_other_frame():
    """Random losses: every chunk lies in one place of the grid, and frames are in order, each once."""
    rng = random.Random(3)
    for _ in range(300):
        fps, chunk, every = rng.choice([1, 2, 5]), rng.choice([2, 3, 4.5]), rng.choice([None, 2, 5, 9])
        chunker = Chunker(fps, chunk, every)
        ticks = [t for t in range(120) if rng.random() < 0.9]
        turns = list(chunker.turns(frames(ticks)))
        seen = []
        for each in turns:
            (number,) = {t // chunker.turn_frames for c in each.chunks for t in ticks_of(c)}
            for c in each.chunks:
                found = ticks_of(c)
                assert len(found) >= 2 and found == list(range(found[0], found[-1] + 1))
                place = [t - number * chunker.turn_frames for t in found]
                assert sum(a <= place[0] and place[-1] < b for a, b in zip(chunker.bounds, chunker.bounds[1:])) == 1
                assert (c.start, c.stop) == (found[0] / fps, (found[-1] + 1) / fps)
                seen += found
        assert seen == sorted(set(seen)) and set(seen) <= set(ticks)
        lone = [t for t in set(ticks) - set(seen)]
        assert sum(t.skipped for t in turns) <= len(lone)


def test_no_chunk_is_longer_than_it_may_be():
    for longest in range(2, 40):
        for frames_of_turn in range(2, 120):
            bounds = Chunker(1, longest, frames_of_turn).bounds
            sizes = [b - a for a, b in zip(bounds, bounds[1:])]
            assert bounds[0] == 0 and bounds[-1] == frames_of_turn and min(sizes) >= 2
            assert all(size % 2 == 0 for size in sizes[:-1])
            at_most = longest + (longest < 4 and frames_of_turn % 2)  # an odd frame of pairs has to go somewhere
            assert max(sizes) <= at_most, (longest, frames_of_turn, sizes)


@pytest.mark.parametrize(
    ("arguments", "name"), [((2, 0.5), "--chunk"), ((0.2, 4), "--chunk"), ((2, 4, 0.5), "--every")]
)
def test_too_short_chunks_are_refused(arguments, name):
    with pytest.raises(EVSError, match=f"{name} got .*at least 2 frames"):
        Chunker(*arguments)


# mailbox


def test_the_latest_turn_wins():
    mailbox = Mailbox()
    for number in range(5):
        mailbox.post(turn(number))
    mailbox.close()
    mailbox.post(turn(9))
    assert mailbox.dropped() == 32 and mailbox.dropped() == 0
    assert mailbox.take() == turn(4) and mailbox.take() is None


def test_without_dropping_the_reader_waits():
    mailbox, posted = Mailbox(waits=True), []

    def turns():
        for number in range(5):
            posted.append(number)
            yield turn(number)

    thread = read_into(mailbox, turns)
    taken = []
    while (each := mailbox.take()) is not None:
        time.sleep(0.02)
        assert len(posted) <= len(taken) + 3, "one taken, one in the box, one in hand"
        taken.append(each)
    thread.join(5)
    assert taken == [turn(number) for number in range(5)] and mailbox.dropped() == 0


def test_closing_frees_a_reader_that_waits():
    mailbox = Mailbox(waits=True)
    thread = read_into(mailbox, lambda: map(turn, range(1000)))
    mailbox.take()
    mailbox.close()
    thread.join(5)
    assert not thread.is_alive()


def test_an_error_comes_after_the_turns_before_it():
    def turns():
        yield turn(0)
        raise EVSError("lost")

    mailbox = Mailbox()
    read_into(mailbox, turns).join(5)
    assert mailbox.take() == turn(0)
    with pytest.raises(EVSError, match="lost"):
        mailbox.take()


def test_frames_are_counted_once_with_two_threads():
    mailbox = Mailbox()
    turns = [Turn(turn(n).chunks, skipped=n % 3) for n in range(2000)]
    threading.Thread(target=lambda: (list(map(mailbox.post, turns)), mailbox.close())).start()
    taken, dropped = 0, 0
    while (each := mailbox.take()) is not None:
        taken += each.frames
        dropped += mailbox.dropped()
    assert taken + dropped + mailbox.dropped() == sum(t.frames + t.skipped for t in turns)


# conversation


def sent(conversation, n, answers=False):
    """The JSON of each of `n` turns' messages."""
    found = []
    for number in range(n):
        conversation.add(turn(number))
        found.append(json.dumps(conversation.messages()))
        conversation.answered(f"answer {number}")
    return found


def test_a_prompt_begins_with_the_last_one_but_its_question():
    bodies = sent(Conversation("What now?"), 6)
    for before, after in zip(bodies, bodies[1:]):
        common = before.partition(', {"type": "text"')[0]
        assert len(common) > 50 and after.startswith(common)
    (message,) = json.loads(bodies[-1])
    assert [p["type"] for p in message["content"]] == ["video_url"] * 6 + ["text"]


def test_with_history_a_prompt_begins_with_all_of_the_last_one():
    bodies = sent(Conversation("What now?", history=True), 6)
    for before, after in zip(bodies, bodies[1:]):
        assert after.startswith(before.removesuffix("]"))
    messages = json.loads(bodies[-1])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 5 + ["user"]
    assert [m["content"] for m in messages[1::2]] == [f"answer {n}" for n in range(5)]


@pytest.mark.parametrize("history", [False, True])
def test_the_oldest_half_is_dropped_at_once(history):
    conversation = Conversation("?", history, keep_s=24)
    for number in range(200):
        dropped = conversation.add(turn(number))
        assert dropped == (4 if number >= 6 and (number - 6) % 4 == 0 else 0), number
        assert conversation.seconds <= 24 and conversation.chunks[-1] == turn(number).chunks[0]
        kept = [int(c.url.split(",")[1]) for c in conversation.chunks]
        assert kept == list(range(kept[0], number + 1))
        messages = conversation.messages()
        assert len(messages) == (2 * len(kept) - 1 if history else 1)
        assert [m["content"] for m in messages[1::2]] == [f"answer {n}" for n in kept[:-1]] * history
        conversation.answered(f"answer {number}")
    assert conversation.forgotten == 200 - len(conversation.chunks)


def test_the_turn_that_is_asked_about_always_stays():
    conversation = Conversation("?", keep_s=1)
    for number in range(3):
        conversation.add(turn(number))
        assert conversation.chunks == list(turn(number).chunks)
    with pytest.raises(EVSError, match="--keep-seconds"):
        Conversation("?", keep_s=-1)
