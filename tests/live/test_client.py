# SPDX-License-Identifier: Apache-2.0
"""The client: what is asked, servers that refuse, restart or fail, and what the user is told."""

import json

import pytest
from aiohttp import web

from evs_vllm.errors import EVSError, ServerError
from evs_vllm.live.chat import Conversation
from evs_vllm.live.chunks import Chunk, Turn
from evs_vllm.live.client import Asking, Client, why_refused
from evs_vllm.serving import free_port
from tests.live.fakes import FakeVLLM, videos_of

KEYS = {"evs_stream": True, "evs_rate": 0.9}


def a_turn(number=0, frames=4):
    url = "data:video/jpeg;base64," + ",".join(f"c{number}f{i}" for i in range(frames))
    return Turn((Chunk(2.0 * number, 2.0 * number + 2, frames, url),))


def asked(question="What?", turns=1, **options):
    conversation = Conversation(question, **options)
    for number in range(turns):
        conversation.add(a_turn(number))
    return conversation


def client_of(server, wait=lambda s: None, **options):
    said = []
    asking = Asking(**{"url": server.url, "model": None, "fps": 2.0, "answer_tokens": 9, "keys": KEYS, **options})
    client = Client(asking, said.append, wait)
    client.connect()
    return client, said


def test_what_is_asked_and_answered():
    with FakeVLLM() as server:
        client, said = client_of(server)
        assert (client.model, client.max_model_len) == ("tiny", 1000)
        pieces = []
        answer = client.ask(asked(), pieces)
        assert (answer.text, answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == ("a man.", 46, 3, 0)
        assert pieces == ["a ", "man", "."] and 0 < answer.ttft_s < 10 and not said
        (body,) = server.bodies
    assert body["mm_processor_kwargs"] == KEYS
    assert body["media_io_kwargs"] == {"video": {"fps": 2.0, "num_frames": -1}}
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("tiny", 9, 0, True)
    assert videos_of(body) == [a_turn().chunks[0].url]


def test_the_prefix_cache_hits_up_to_the_question():
    with FakeVLLM(max_model_len=10_000) as server:
        client, _ = client_of(server)
        conversation, lengths, cached = Conversation("What?"), [], []
        for number in range(5):
            conversation.add(a_turn(number))
            answer = client.ask(conversation)
            lengths.append(answer.prompt_tokens)
            cached.append(answer.cached_tokens)
        assert [b - a for a, b in zip(lengths, lengths[1:])] == [40] * 4
        assert cached == [0, *(n - len("What?") for n in lengths[:-1])]
        assert [videos_of(body)[:n] for n, body in enumerate(server.bodies)] == [
            videos_of(server.bodies[-1])[:n] for n in range(5)
        ]


def test_without_keys_and_with_a_key():
    with FakeVLLM(key="secret") as server:
        client, _ = client_of(server, keys={}, api_key="secret", model="lora")
        assert client.ask(asked()).text == "a man."
        assert "mm_processor_kwargs" not in server.bodies[0] and server.bodies[0]["model"] == "lora"
        with pytest.raises(EVSError, match="401"):
            client_of(server)


def test_connecting_to_nobody_or_to_another_model():
    with FakeVLLM() as server, pytest.raises(EVSError, match="no model 'large'; it has tiny, lora"):
        client_of(server, model="large")
    with pytest.raises(EVSError, match="no server answers at .*/v1/models"):
        Client(Asking(f"http://127.0.0.1:{free_port()}", None, 2, 9, {}), print).connect()


def test_an_empty_answer_is_one():
    with FakeVLLM(answer=()) as server:
        answer = client_of(server)[0].ask(asked())
    assert answer.text == "" and answer.ttft_s != answer.ttft_s and answer.prompt_tokens == 46


def test_a_server_that_takes_no_media_io_kwargs_is_asked_without_and_the_user_told_once():
    with FakeVLLM(trusts=False) as server:
        client, said = client_of(server)
        for turns in (1, 2):
            assert client.ask(asked(turns=turns)).text == "a man."
        assert server.seen == 3 and all("media_io_kwargs" not in body for body in server.bodies)
    assert len(said) == 1 and "--trust-request-mm-kwargs" in said[0]
    assert """--media-io-kwargs '{"video": {"fps": 2.0, "num_frames": -1}}'""" in said[0]


def test_chunks_that_such_a_server_would_cut_are_refused():
    with FakeVLLM(trusts=False) as server:
        conversation = Conversation("?")
        conversation.add(a_turn(frames=33))
        with pytest.raises(EVSError, match="33 frames, of which this server may take 32"):
            client_of(server)[0].ask(conversation)


def test_a_server_that_breaks_in_the_middle_is_asked_again():
    with FakeVLLM(script=lambda number: "break" if number < 2 else None) as server:
        client, said = client_of(server)
        pieces = ["left"]
        assert client.ask(asked(), pieces).text == "a man."
        assert pieces == ["a ", "man", "."], "nothing twice"
        assert server.bodies[0] == server.bodies[1] == server.bodies[2]
    assert len(said) == 2 and "trying again" in said[0] and "answers again after" in said[1]


def test_a_server_that_restarts_is_waited_for():
    waits = []
    with FakeVLLM(script=lambda number: web.Response(status=503, text="loading") if number < 8 else None) as server:
        server.healthy = False

        def wait(seconds):
            waits.append(seconds)
            server.healthy = len(waits) >= 7

        client, said = client_of(server, wait)
        assert client.ask(asked()).text == "a man."
    assert waits == [0.5, 1, 2, 4, 8, 10, 10, 10] and len(said) == 2


def test_a_server_that_is_healthy_and_fails_is_asked_three_times():
    with FakeVLLM(script=lambda number: web.Response(status=500, text="a bug")) as server:
        with pytest.raises(ServerError, match="HTTP 500: a bug"):
            client_of(server)[0].ask(asked())
        assert server.seen == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_waited_for_though_its_router_is_healthy(status):
    waits = []
    with FakeVLLM(script=lambda number: web.Response(status=status, text="later") if number < 8 else None) as server:
        client, said = client_of(server, waits.append)
        assert client.ask(asked()).text == "a man."
    assert len(waits) == 8 and len(said) == 2


def test_a_server_that_stays_away_is_an_error(monkeypatch):
    server = FakeVLLM()
    with server:
        clock = [0.0]
        client, said = client_of(server, lambda s: clock.__setitem__(0, clock[0] + s), patience_s=60)
    monkeypatch.setattr("evs_vllm.live.client.time.monotonic", lambda: clock[0])
    with pytest.raises(EVSError, match="did not come back within 60 s"):
        client.ask(asked())
    assert 60 < clock[0] < 75 and len(said) == 1


def refusal(message, turns=3, **options):
    conversation = asked(turns=turns, **options)
    return str(why_refused(ServerError("x", message, 400), conversation, 6.0, turns - 1))


def test_a_full_session_says_how_long_it_lasted_and_what_to_do():
    for words in ("This model's maximum context length is 100 tokens.", "take up 900 position IDs before pruning"):
        text = refusal(words)
        assert "full at 6 s, after 2 turn(s)" in text and "6 s of video in 3 chunk(s)" in text
        assert "--keep-seconds below 6 " in text and "HTTP 400: " + words in text
    assert "--keep-seconds" not in refusal("maximum context length", turns=1)
    assert "shorter --chunk" in refusal("maximum context length", turns=1)


def test_a_server_without_evs_is_told_apart():
    for words in ("Per-request mm_processor_kwargs are disabled by default", "EVS is off here, but the request sets"):
        assert "--plain" in refusal(words, turns=1)
    text = refusal("no such thing")
    assert "refused the turn that ends at 6 s, after 2 turn(s)" in text and "no such thing" in text
    assert json.dumps(text)
