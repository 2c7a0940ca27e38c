# SPDX-License-Identifier: Apache-2.0
"""`evs-vllm doctor --server`: servers that agree, that differ, that are no servers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from aiohttp import web

from evs_vllm.cli import _fleet, main
from evs_vllm.config import EVSConfig
from evs_vllm.fingerprint import METRIC, fingerprint
from evs_vllm.serving import free_port
from tests.unit.local_server import LocalServer

PARTS = fingerprint(EVSConfig(rate=0.75))


def series(parts: Mapping[str, str], value: str = "1.0") -> str:
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()
    Gauge(METRIC, "As vLLM's client writes it.", list(parts), registry=registry).labels(**parts).set(float(value))
    return generate_latest(registry).decode()


class Metrics(LocalServer):
    """A server whose only page is ``/metrics``."""

    def __init__(self, *pages: str, status: int = 200) -> None:
        self.text, self.status = "vllm:num_requests_running 0.0\n" + "".join(pages), status
        super().__init__()

    def routes(self):
        return [web.get("/metrics", self.answer)]

    async def answer(self, request: web.Request) -> web.Response:
        return web.Response(text=self.text, status=self.status)


@contextmanager
def servers(*several: Mapping[str, str]) -> Iterator[list[str]]:
    running = [Metrics(series(parts)) for parts in several]
    try:
        yield [server.url for server in running]
    finally:
        for server in running:
            server.__exit__()


def doctor(capsys, *words: str) -> tuple[int, str]:
    code = main(["doctor", "--server", *words])
    return code, capsys.readouterr().out


def test_servers_that_agree(capsys):
    with servers(PARTS, PARTS) as urls:
        code, out = doctor(capsys, urls[0], "--server", f"{urls[1]}/v1/")
    assert code == 0 and out.endswith("The servers and this installation agree.\n")
    (rate,) = [line.split() for line in out.splitlines() if line.startswith("rate ")]
    assert rate == ["rate", "-", "3/4", "3/4"]
    assert "!!" not in out and "differs" not in out


@pytest.mark.parametrize(
    ("changed", "way"), [("rate", "the same --evs-* options"), ("weights", "the same versions on all machines")]
)
def test_two_that_differ(capsys, changed, way):
    with servers(PARTS, {**PARTS, changed: "else", "fingerprint": "other"}) as urls:
        code, out = doctor(capsys, *urls)
    assert code == 1
    (loud,) = [line for line in out.splitlines() if line.startswith("!!")]
    assert f"NOT THE SAME EVERYWHERE: {changed}. " in loud and way in loud
    assert [line.split()[0] for line in out.splitlines() if line.endswith("<- differs")] == [changed]


def test_a_server_that_differs_from_what_is_installed_here(capsys):
    with servers({**PARTS, "code": "other"}) as urls:
        code, out = doctor(capsys, *urls)
    assert code == 1 and "NOT THE SAME EVERYWHERE: code." in out


def test_the_processes_of_one_server_differ(capsys):
    other = {**PARTS, "selection": "paper", "fingerprint": "other"}
    with Metrics(series(PARTS), series(other), series({**PARTS, "rate": "0"}, "0")) as server:
        code, out = doctor(capsys, server.url)
    assert code == 1 and "has processes of 2 kinds" in out and "EVERYWHERE: selection." in out
    assert f"{server.url.removeprefix('http://')} (2)" in out


def test_a_server_without_evs(capsys):
    with Metrics() as server, servers(PARTS) as urls:
        code, out = doctor(capsys, *urls, server.url)
    assert code == 1 and f"!! {server.url} shows no evs:build_info: EVS is off there" in out


def test_no_server(capsys):
    nowhere = f"127.0.0.1:{free_port()}"
    with Metrics(status=500) as broken, servers(PARTS) as urls:
        code, out = doctor(capsys, nowhere, broken.url, *urls, "ftp:/x")
    assert code == 1
    for url in (f"http://{nowhere}", broken.url, "http://ftp:/x"):
        assert f"!! {url} shows no metrics: " in out, out
    assert "3/4" in out, "the others are shown all the same"


def test_json(capsys):
    with servers(PARTS, {**PARTS, "rate": "1/2"}) as urls:
        code, out = doctor(capsys, *urls, "--json")
    report = json.loads(out)
    assert code == 1 and report["differing"] == ["rate"] and len(report["problems"]) == 1
    assert report["parts"][urls[1]]["rate"] == "1/2" and set(report["parts"]) == {"here", *urls}


@pytest.mark.parametrize(
    "url", ["http://a:8000", "a:8000", "a:8000/", "http://a:8000/v1", "a:8000/v1/", "http://a:8000/metrics"]
)
def test_urls_as_people_write_them(url):
    assert _fleet.base_url(url) == "http://a:8000"
