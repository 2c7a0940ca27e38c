# SPDX-License-Identifier: Apache-2.0
"""evs_vllm.serving: counters, and requests to a server that is made here."""

import base64
import json
import math
import socket
import threading
import time

import pytest
from aiohttp import web

from evs_vllm import serving
from evs_vllm.errors import EVSError, ServerError
from evs_vllm.serving import (
    ask,
    chat,
    data_url,
    free_port,
    metrics,
    parse_info,
    parse_metrics,
    video_part,
)
from tests.unit.local_server import LocalServer

METRICS = r"""
# HELP evs:clips_total Clips that "were {pruned}" 7
# TYPE evs:clips_total counter
evs:clips_total{engine="0",model_name="a"} 3.0
evs:clips_total{engine="1",model_name="with } and \" and , inside"} 1.5e+03
evs:clips_total_created{engine="0"} 1.7e9
evs:small 2.5e-05 1395066363000
evs:time_seconds_bucket{le="0.1"} 3
evs:time_seconds_bucket{le="+Inf"} 4
evs:time_seconds_sum 0.25
evs:time_seconds_count 4
evs:nothing NaN
evs:endless{a=""} +Inf
evs:below -2
evs:spaces{a = "b", c = "d"}   9
not a sample
"""


class Server(LocalServer):
    """Answers as vLLM does, in a way that the test chooses."""

    def __init__(self, *lines, status=200, error=None):
        self.lines, self.status, self.error, self.seen = lines, status, error, []
        super().__init__()

    def routes(self):
        return [
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.post("/v1/chat/completions", self.answer),
        ]

    async def health(self, _):
        return web.Response(status=self.status)

    async def metrics(self, _):
        return web.Response(text=METRICS, status=self.status)

    async def answer(self, request):
        self.seen.append(await request.json())
        self.headers = request.headers
        if self.error is not None:
            return web.Response(text=self.error, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        for line in self.lines:
            await response.write(f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n".encode())
        return response


def piece(text):
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 34, "completion_tokens": 2, "total_tokens": 36}}


# counters


def test_samples_are_summed_over_labels():
    found = parse_metrics(METRICS)
    assert math.isnan(found.pop("evs:nothing"))
    assert found == {
        "evs:clips_total": 1503.0, "evs:clips_total_created": 1.7e9, "evs:small": 2.5e-05,
        "evs:time_seconds_sum": 0.25, "evs:time_seconds_count": 4.0, "evs:endless": math.inf, "evs:below": -2.0,
        "evs:spaces": 9.0,
    }  # fmt: skip


def test_what_is_no_metrics_has_no_samples():
    assert parse_metrics("<html>\n404 not found 7\nhello world\n{} 1\n") == {}


def test_labels_of_an_info_as_they_were_before_they_were_written():
    text = r"""evs:other{a="1"} 1.0
evs:info{a="x \" } , b=\"y\"",c_1="a\\b\nc",empty=""} 1.0
evs:info{a="gone"} 0.0
evs:info{ a = "two", } 2 1395066363000
evs:info 1"""
    assert parse_info(text, "evs:info") == [
        {"a": 'x " } , b="y"', "c_1": "a\\b\nc", "empty": ""}, {"a": "two"}, {},
    ]  # fmt: skip
    assert parse_info("<html>evs:info</html>", "evs:info") == []


def test_metrics_and_health_of_a_server():
    with Server() as server:
        assert metrics(server.url)["evs:clips_total"] == 1503
        assert serving.healthy(server.url)
    with Server(status=503) as server:
        assert not serving.healthy(server.url)
        with pytest.raises(OSError, match="503"):
            metrics(server.url)
    assert not serving.healthy(server.url), "it is gone"


def test_a_proxy_of_the_environment_is_for_others(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(piece("a"), USAGE, "[DONE]") as server:
        assert serving.healthy(server.url)
        assert ask(server.url, "m", video_part("data:,"), "?", 2).text == "a"
    assert not serving.is_local("http://example.invalid:8000")
    with pytest.raises(OSError, match="refused"):  # by the proxy's port, not by a name that cannot be found
        serving.read_url("http://example.invalid/metrics")


# requests


def test_an_answer_is_read_off_the_stream():
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    with Server(role, piece("a "), piece("bike"), {"choices": [{"delta": {}}]}, USAGE, "[DONE]") as server:
        more = {"mm_processor_kwargs": {"evs_rate": 0}}
        answer = ask(server.url, "tiny", video_part("file:///a.mp4"), "What?", 7, more)
    assert answer[:3] == ("a bike", 34, 2) and 0 < answer.ttft_s < 10
    (body,) = server.seen
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("tiny", 7, 0, True)
    assert body["mm_processor_kwargs"] == {"evs_rate": 0}
    video, text = body["messages"][0]["content"]
    assert video["video_url"]["url"] == "file:///a.mp4" and text == {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ((), json.dumps({"error": {"message": "too long"}}), "refused the request: HTTP 400: too long"),
        ((), "plain words", "refused the request: HTTP 400: plain words"),
        ((piece("a"), {"error": {"message": "out of memory"}}), None, "gave up: .*out of memory"),
        ((USAGE, "[DONE]"), None, "without any text"),
        ((piece("a"),), None, "broke off"),
        ((piece("a"), '{"choices": ['), None, "did not answer"),
        ((piece("a"), "[1]"), None, "none of vLLM's"),
        (("5",), None, "none of vLLM's"),
        (({"choices": [{"delta": None}]},), None, "none of vLLM's"),
        (({"choices": [{}]},), None, "none of vLLM's"),
        ((piece("a"), {"usage": {"prompt_tokens": 3}}), None, "none of vLLM's"),
    ],
)
def test_what_goes_wrong_is_said(lines, error, words):
    with Server(*lines, error=error) as server, pytest.raises(EVSError, match=words):
        ask(server.url, "m", video_part("data:,"), "?", 2)


def test_any_messages_and_what_the_server_says_beside_the_answer():
    details = {"prompt_tokens_details": {"cached_tokens": 21}}
    usage = {**USAGE, "usage": USAGE["usage"] | details}
    messages, heard = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}], []
    with Server(piece("a "), piece("b"), usage, "[DONE]") as server:
        body = {"model": "m", "messages": messages, "max_tokens": 3}
        answer = chat(server.url, body, headers={"Authorization": "Bearer key"}, heard=heard.append)
    assert answer[:3] == ("a b", 34, 2) and answer.cached_tokens == 21 and heard == ["a ", "b"]
    assert server.seen == [{**body, "stream": True, "stream_options": {"include_usage": True}}]
    assert server.headers["Authorization"] == "Bearer key" and server.headers["Content-Type"] == "application/json"


def test_an_answer_without_text_is_one():
    with Server(USAGE, "[DONE]") as server:
        answer = chat(server.url, {"messages": []})
    assert answer.text == "" and math.isnan(answer.ttft_s) and answer.cached_tokens is None


@pytest.mark.parametrize(
    ("lines", "error", "status", "message"),
    [
        ((), json.dumps({"error": {"message": "too long"}}), 400, "too long"),
        (({"error": {"message": "dead", "code": 500}},), None, 500, "{'message': 'dead', 'code': 500}"),
        (({"error": "dead"},), None, None, "dead"),
        ((piece("a"),), None, None, "the answer broke off"),
    ],
)
def test_errors_of_a_server_have_its_status_and_words(lines, error, status, message):
    with Server(*lines, error=error) as server, pytest.raises(ServerError) as caught:
        chat(server.url, {"messages": []})
    assert (caught.value.status, caught.value.message) == (status, message)


@pytest.mark.parametrize("hangs", [False, True], ids=["breaks off", "hangs"])
def test_a_refusal_whose_words_do_not_come(hangs):
    """As a proxy answers while the server behind it restarts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 100\r\n\r\nhalf")
                if hangs:
                    time.sleep(2)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ServerError) as caught:
            chat(f"http://127.0.0.1:{listening.getsockname()[1]}", {"messages": []}, timeout_s=0.5)
        thread.join()
    assert (caught.value.status, caught.value.message) == (503, "Service Unavailable")


def test_nobody_answers():
    with pytest.raises(EVSError, match="did not answer"):
        ask(f"http://127.0.0.1:{free_port()}", "m", video_part("data:,"), "?", 2)


def test_parts_of_files_and_urls(tmp_path):
    for name, kind in (("a.mp4", "video/mp4"), ("a.webm", "video/webm"), ("a.unknown", "video/mp4")):
        (tmp_path / name).write_bytes(b"frames")
        part = video_part(tmp_path / name)
        assert part["type"] == "video_url"
        head, data = part["video_url"]["url"].split(",")
        assert head == f"data:{kind};base64" and base64.b64decode(data) == b"frames"
    assert video_part("http://x/a.mp4")["video_url"]["url"] == "http://x/a.mp4"
    assert data_url(b"123", "image/png") == "data:image/png;base64,MTIz"
