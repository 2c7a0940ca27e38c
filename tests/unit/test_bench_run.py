# SPDX-License-Identifier: Apache-2.0
"""A whole run of the end-to-end benchmark, against a stub in place of vLLM."""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

from aiohttp import web

from bench.serve import __main__ as command
from bench.serve import bench, client, measurements, run
from bench.serve.pool import Live, server_of
from tests.unit.local_server import LocalServer

ROOT = Path(__file__).resolve().parents[2]


class StubServers(LocalServer):
    """Stands in for `pool.Pool`: one HTTP server that answers like vLLM, with the right number of prompt tokens."""

    TEXT, VIDEO, UNITS = 34, 160, 8  # 16 frames of 20 tokens a unit

    def __init__(self, *args, wrong_row=None, failing=None):
        self.started, self.failed, self.wrong_row = [], {}, wrong_row
        self.failing = failing
        super().__init__()

    def routes(self):
        return [web.post("/{server}/v1/chat/completions", self.answer), web.get("/{server}/metrics", self.metrics)]

    async def answer(self, request):
        options = (await request.json()).get("mm_processor_kwargs", {})
        server = request.match_info["server"]
        rate = options.get("evs_rate", 0.75 if server.startswith("stock") else 0)
        kept = measurements.kept_tokens(self.VIDEO, self.UNITS, rate, server.startswith("stock"))
        tokens = self.TEXT + kept - (server == self.wrong_row)
        usage = {"prompt_tokens": tokens, "completion_tokens": 4}
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in ({"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                      {"choices": [{"delta": {"content": "a road"}}]}, {"choices": [], "usage": usage}):  # fmt: skip
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def metrics(self, request):
        return web.Response(text='evs:planning_time_seconds_sum{a="b"} 0.5\nevs:planning_time_seconds_count 7.0\n')

    def __contains__(self, name):
        return name in self.started

    def __getitem__(self, name):
        process = types.SimpleNamespace(poll=lambda: None, pid=os.getpid())
        return Live(server_of("vanilla", 0.75, "cpu"), f"{self.url}/{name}", process, None)

    def need(self, servers):
        if self.failing:
            self.failed[self.failing] = "did not start"
        new = [server for server in servers if server.name not in self.started]
        self.started += [server.name for server in new]
        return []

    def stop(self):
        self.started.clear()


def run_smoke(monkeypatch, tmp_path, **options):
    monkeypatch.setattr(run, "Pool", lambda *args: StubServers(**options))
    monkeypatch.setattr(bench, "SETTLE_S", 0)
    monkeypatch.setattr(client, "text_tokens", lambda model, turns: StubServers.TEXT)
    monkeypatch.setattr(Live, "reset_peak_memory", lambda self: True)
    monkeypatch.setattr(Live, "peak_memory_mb", lambda self: 123.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "out.json"
    settings = str(ROOT / "configs" / "bench" / "smoke.yaml")
    monkeypatch.setattr(sys, "argv", ["bench/serve", settings, "--model", "stub", "--out", str(out)])
    code = command.main()
    return code, json.loads(out.read_text())


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    code, content = run_smoke(monkeypatch, tmp_path)
    assert code == 0
    assert content["complete"]
    assert [point["error"] for point in content["results"]] == [None] * len(content["results"])
    assert {point["row"] for point in content["results"]} == {"vanilla", "stock", "evs-full", "evs-reuse", "evs-off"}
    reuse = next(point for point in content["results"] if point["row"] == "evs-reuse")
    assert (reuse["prompt_tokens"], reuse["samples"], reuse["memory_mb"]) == (34 + 40, 4, 123.0)
    assert content["config"]["settings"] == "smoke.yaml"
    assert "vLLM's CPU engine crashes" in (tmp_path / "out.md").read_text()
    assert "evs-reuse" in capsys.readouterr().out


def test_a_row_with_wrong_tokens_has_no_figures(monkeypatch, tmp_path):
    code, content = run_smoke(monkeypatch, tmp_path, wrong_row="stock-0.75")
    assert code == 1
    for point in content["results"]:
        assert (point["ttft_p50_s"] is None) == (point["row"] == "stock")
        assert (point["error"] is None) == (point["row"] != "stock")


def test_a_server_that_does_not_start_costs_its_rows_only(monkeypatch, tmp_path):
    code, content = run_smoke(monkeypatch, tmp_path, failing="evs")
    assert code == 1
    errors = {point["row"]: point["error"] for point in content["results"]}
    assert errors["vanilla"] is errors["stock"] is None
    assert errors["evs-full"] == errors["evs-reuse"] == "did not start"
