# SPDX-License-Identifier: Apache-2.0
"""Frames at even distances: of files, cameras, sources that break, and a real file through OpenCV."""

import asyncio
import random
import sys
import threading

import numpy as np
import pytest
from aiohttp import web

from evs_vllm.errors import EVSError
from evs_vllm.live import source
from evs_vllm.live.source import Player, Source, check_opencv, open_capture, parse_source
from evs_vllm.testing import real_clip_path
from tests.live.fakes import Camera, Clock, level
from tests.unit.local_server import LocalServer

FILE = Source("a.mp4", "a.mp4", True)
CAMERA = Source("camera 0", 0, False)


def play(what, cameras, fps=2.0, clock=None, **options):
    """(frames, what was said) of a source that opens as each of `cameras` in turn; None does not open."""
    clock, said, opened = clock or Clock(), [], iter(cameras)
    player = Player(what, fps, clock, said.append, opener=lambda target: next(opened), clock=clock, **options)
    return list(player), said


def expected(times, fps):
    """By the definition: for each tick the first frame at or after it, as long as it is not a gap too late."""
    found, tick = [], 0
    for i, t in enumerate(times):
        now = int(t * fps + 1e-6)
        if now >= tick and now - tick > max(fps, 1):
            tick = now
        while tick <= now:
            found.append((tick, i))
            tick += 1
    return found


@pytest.mark.parametrize("fps", [0.5, 1, 2, 3, 7.5, 40])
@pytest.mark.parametrize("rate", [1, 5, 24, 29.97, 60])
def test_a_file_gives_a_frame_a_tick(fps, rate):
    times = [i / rate for i in range(int(6 * rate))]
    clock = Clock()
    frames, said = play(FILE, [Camera(times)], fps, clock)
    assert [(f.tick, level(f.jpeg)) for f in frames] == [(k, i % 256) for k, i in expected(times, fps)]
    assert [f.tick for f in frames] == list(range(len(frames))) and not said
    assert clock.now - 100 == pytest.approx(times[-1]), "it takes as long as the video"


def test_random_times_and_gaps():
    rng = random.Random(7)
    for _ in range(200):
        times = [0.0]
        while len(times) < 60:
            times.append(times[-1] + rng.choice([0.01, 0.04, 0.3, 0.9, 1.4, 5.0]) * rng.random())
        fps = rng.choice([0.4, 1, 2, 3.3, 10])
        frames, _ = play(FILE, [Camera([t + 3 for t in times])], fps)  # its own times begin anywhere
        assert [(f.tick, level(f.jpeg)) for f in frames] == expected([(t + 3) - 3 for t in times], fps)


def test_fast_does_not_wait():
    clock = Clock()
    frames, _ = play(FILE, [Camera([i / 10 for i in range(100)])], clock=clock, fast=True)
    assert len(frames) == 20 and clock.now == 100 and not clock.waits


def test_a_file_without_times_has_those_of_its_rate():
    frames, _ = play(FILE, [Camera([0.0] * 50, rate=10)])
    assert [(f.tick, level(f.jpeg)) for f in frames] == [(k, 5 * k) for k in range(10)]


def test_frames_between_ticks_are_not_decoded():
    camera = Camera([i / 30 for i in range(300)])
    frames, _ = play(FILE, [camera])
    assert camera.retrieved == len(frames) == 20 and camera.released


def test_a_camera_has_the_time_of_this_machine_and_ends_when_told():
    clock = Clock(end=5.2)
    camera = Camera([i / 25 for i in range(10_000)], clock)
    frames, said = play(CAMERA, [camera], clock=clock)
    assert [f.tick for f in frames] == list(range(11)) and camera.released and not said
    assert level(frames[10].jpeg) == 125


def test_a_source_that_breaks_is_opened_again_more_and_more_seldom():
    clock = Clock(end=120)
    first = Camera([*(i / 10 for i in range(41)), None], clock)
    mute = Camera([None], clock)  # opens, and delivers nothing
    again = Camera([i / 10 for i in range(41)] + [None], clock, size=(20, 24))
    last = Camera([i / 10 for i in range(2000)], clock)
    frames, said = play(CAMERA, [first, None, mute, None, again, last], clock=clock)
    assert clock.waits == [0.5, 1, 2, 4, 0.5], "the delay starts anew"
    assert first.released and mute.released and again.released and last.released
    ticks = [f.tick for f in frames]
    assert ticks == sorted(set(ticks))
    assert ticks[:9] == list(range(9)) and ticks[9] == 23  # 4 s and 7.5 s of back-off later
    assert [f.size for f in frames[:10]] == [(16, 24)] * 9 + [(20, 24)]
    assert len(said) == 4 and "lost after 4.0 s" in said[0] and "back after 7.5 s" in said[1]


def test_a_source_that_stays_away_is_an_error():
    clock = Clock()
    cameras = [Camera([0, 0.1, None], clock), *[None] * 50]
    with pytest.raises(EVSError, match="camera 0 is lost, and did not come back within 60 s"):
        play(CAMERA, cameras, clock=clock, patience_s=60)
    assert max(clock.waits) == source.LONGEST_BACK_OFF_S and 160 < clock.now < 180


def test_stop_ends_the_waiting_for_a_source():
    clock = Clock(end=3)
    frames, said = play(CAMERA, [Camera([0, 0.1, None], clock), *[None] * 50], clock=clock)
    assert len(frames) == 1 and len(said) == 1 and clock.now == 103


def test_what_does_not_open_is_an_error_at_once():
    clock = Clock()
    with pytest.raises(EVSError, match="cannot open camera 0"):
        play(CAMERA, [None], clock=clock)
    assert not clock.waits


def test_a_url_with_an_end_is_a_file():
    url = Source("http://h/a.mp4", "http://h/a.mp4", False)
    clock = Clock()
    frames, said = play(url, [Camera([i / 10 for i in range(30)])], clock=clock)
    assert len(frames) == 6 and not said


def test_large_frames_are_made_smaller():
    for size, expected_size in (((90, 160), (45, 80)), ((160, 90), (80, 45)), ((40, 80), (40, 80))):
        frames, _ = play(FILE, [Camera([0.0], size=size)], max_side=80)
        assert [f.size for f in frames] == [expected_size]


def test_a_real_file_through_opencv():
    import cv2

    path = real_clip_path("bikes")  # 250 frames, 25 a second
    stop = Clock()
    frames = list(Player(parse_source(str(path)), 2.0, stop, print, clock=stop))
    assert [f.tick for f in frames] == list(range(20)) and stop.now - 100 == pytest.approx(9.96)
    capture, read = cv2.VideoCapture(str(path)), []
    while (result := capture.read())[0]:
        read.append(result[1])
    for frame in frames:
        # Of 12.5 frames, the later one.
        original = read[-(-frame.tick * 25 // 2)]
        decoded = cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert decoded.shape[:2] == frame.size == original.shape[:2]
        others = [np.abs(decoded.astype(int) - read[i]).mean() for i in range(0, 250, 25) if i != frame.tick * 25 / 2]
        assert np.abs(decoded.astype(int) - original).mean() < min(others) / 2
    again = list(Player(parse_source(str(path)), 2.0, stop, print, fast=True, clock=stop))
    assert again == frames, "the same bytes"


def test_what_a_source_is(tmp_path):
    (file := tmp_path / "a.mp4").touch()
    assert parse_source("1") == ("camera 1", 1, False)
    assert parse_source("rtsp://host/cam") == ("rtsp://host/cam", "rtsp://host/cam", False)
    assert parse_source(str(file)) == ("a.mp4", str(file), True)
    with pytest.raises(EVSError, match="no such video file: b.mp4; a camera is a number"):
        parse_source("b.mp4")
    assert open_capture(str(file)) is None, "it is empty"
    assert open_capture("http://127.0.0.1:9/a.mp4") is None


def test_opencv_is_asked_for(monkeypatch):
    check_opencv()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(EVSError, match=r'pip install "evs-vllm\[live\]"'):
        check_opencv()


class Web(LocalServer):
    """Serves a video file, and a camera's MJPEG stream that ends after 30 frames of 20 ms."""

    def __init__(self):
        self.streams = 0
        super().__init__()

    def routes(self):
        return [web.get("/a.mp4", self.file), web.get("/cam.mjpg", self.camera)]

    async def file(self, request):
        return web.FileResponse(real_clip_path("bikes"))

    async def camera(self, request):
        import cv2

        self.streams += 1
        response = web.StreamResponse(headers={"Content-Type": "multipart/x-mixed-replace; boundary=frame"})
        await response.prepare(request)
        for level_ in range(30):
            _, jpeg = cv2.imencode(".jpg", np.full((32, 48, 3), 8 * level_, np.uint8))
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            await response.write(head.encode() + jpeg.tobytes() + b"\r\n")
            await asyncio.sleep(0.02)
        return response


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_file_behind_a_url(no_proxy):
    with Web() as server:
        stop = Clock()
        frames = list(Player(parse_source(f"{server.url}/a.mp4"), 2.0, stop, print, fast=True, clock=stop))
    assert frames == list(Player(parse_source(str(real_clip_path("bikes"))), 2.0, stop, print, fast=True, clock=stop))


def test_a_network_camera_that_ends_is_opened_again(no_proxy):
    stop, said, ticks = threading.Event(), [], []
    with Web() as server:
        for frame in Player(parse_source(f"{server.url}/cam.mjpg"), 10.0, stop, said.append):
            ticks.append(frame.tick)
            assert frame.size == (32, 48)
            if server.streams == 3:
                stop.set()
    assert server.streams == 3 and ticks == sorted(set(ticks))
    assert [("is lost" in text, "is back" in text) for text in said][:2] == [(True, False), (False, True)]
