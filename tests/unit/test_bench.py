# SPDX-License-Identifier: Apache-2.0
"""The parts of the end-to-end benchmark: clips, settings, requests, checks, statistics."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bench.common.clips import ClipSpec, changed_tokens, clip_file, decode
from bench.serve import measurements as points
from bench.serve.client import Sample, body, messages
from bench.serve.measurements import Cell, Point, Repeat
from bench.serve.pool import flags, request_options, server_of
from bench.serve.settings import as_json, load_settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.errors import EVSError

ROOT = Path(__file__).resolve().parents[2]


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
    ("total", "units", "rate", "kept", "stock"),
    [(100, 10, 0.9, 15, 10), (3696, 16, 0.75, 924, 924), (3696, 16, 0.9, 405, 369), (3696, 16, 0.99, 249, 231),
     (7, 1, 0.5, 7, 7)],
)  # fmt: skip
def test_kept_tokens(total, units, rate, kept, stock):
    assert points.kept_tokens(total, units, rate) == kept == token_budget(units, total // units, EVSConfig(rate=rate))
    assert points.kept_tokens(total, units, rate, stock=True) == stock


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
