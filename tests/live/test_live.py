# SPDX-License-Identifier: Apache-2.0
"""`evs-vllm live` as a whole: a real file, a camera faster than the server, Ctrl-C, a full context, JSON."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from evs_vllm.cli import main
from evs_vllm.cli.live import request_keys
from evs_vllm.errors import EVSError
from evs_vllm.live.chat import Conversation
from evs_vllm.live.chunks import Chunker
from evs_vllm.live.client import Asking, Client
from evs_vllm.live.report import HEAD, Report, Row
from evs_vllm.live.session import Interrupt, watch
from evs_vllm.live.source import Player, Source
from evs_vllm.testing import real_clip_path
from tests.live.fakes import FakeVLLM, videos_of

BIKES = str(real_clip_path("bikes"))  # 10 s at 25 frames a second, the last one at 9.96 s
LIVE = [sys.executable, "-u", "-c", "import sys; from evs_vllm.cli import main; sys.exit(main())", "live"]


def live(capsys, server, *words, source=BIKES):
    code = main(["live", source, "--server", server.url, *words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_a_file_as_fast_as_the_server(capsys):
    with FakeVLLM(max_model_len=4000) as server:
        code, lines, err = live(capsys, server, "--fast", "--question", "Who?", "--rate", "0.9")
        assert code == 0
        assert [len(videos_of(body)) for body in server.bodies] == [1, 2, 3]
        urls = videos_of(server.bodies[-1])
        for number, body in enumerate(server.bodies, 1):
            assert videos_of(body) == urls[:number], "the same bytes"
            assert body["mm_processor_kwargs"] == {"evs_stream": True, "evs_rate": 0.9}
        assert [url.count(",") for url in urls] == [8, 8, 4]
    assert lines[0] == HEAD and len(lines) == 5
    columns = [line.split("  ") for line in lines[1:4]]
    assert [[c.strip() for c in row if c.strip()] for row in columns] == [
        ["4.0 s", "+85", "85 of 4000 (2.1 %)", "0", row[4].strip(), "0", "a man."] if number == 0 else
        ["8.0 s", "+80", "165 of 4000 (4.1 %)", "81", row[4].strip(), "0", "a man."] if number == 1 else
        ["10.0 s", "+40", "205 of 4000 (5.1 %)", "161", row[4].strip(), "0", "a man."]
        for number, row in enumerate([[c.strip() for c in r if c.strip()] for r in columns])
    ]  # fmt: skip
    assert lines[4].startswith("the source has ended: 3 turn(s), 10.0 s of video, 205 prompt tokens in the last turn")
    assert "0 frame(s) dropped" in lines[4]
    assert "a question every 4 s, 8 frames at 2 a second" in err


def test_json_has_one_object_a_turn(capsys):
    with FakeVLLM(details=False, max_model_len=4000) as server:
        code, lines, err = live(capsys, server, "--fast", "--json", "--every", "5", "--history")
        body = server.bodies[-1]
    rows = [json.loads(line) for line in lines]
    assert code == 0 and [row["turn"] for row in rows] == [1, 2]
    assert [(row["start_s"], row["stop_s"], row["frames"], row["chunks"]) for row in rows] == [
        (0, 5, 10, 2), (5, 10, 10, 4),
    ]  # fmt: skip
    assert [row["cached_tokens"] for row in rows] == [None, None]
    assert rows[0]["new_tokens"] + rows[1]["new_tokens"] == rows[1]["prompt_tokens"]
    assert all(row["answer"] == "a man." and row["complete"] and row["ttft_s"] > 0 for row in rows)
    assert set(rows[0]) == set(Row.__dataclass_fields__)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert "the source has ended: 2 turn(s)" in err


def test_a_file_in_real_time(capsys):
    with FakeVLLM(max_model_len=4000) as server:
        started = time.monotonic()
        code, lines, _ = live(capsys, server, "--chunk", "1", source=str(real_clip_path("carphone_pristine")))
        assert time.monotonic() - started > 3.9, "the clip has 3.97 s"
    assert code == 0 and len(lines) == 6 and lines[1].split()[0] == "1.0"


def test_a_full_context_ends_the_session_and_says_so(capsys):
    with FakeVLLM(max_model_len=170) as server:
        code, lines, err = live(capsys, server, "--fast", "--question", "Who?")
    assert code == 2 and len(lines) == 4
    assert lines[-1].startswith("ended by an error: 2 turn(s), 8.0 s of video")
    assert "full at 10 s, after 2 turn(s): 10 s of video in 3 chunk(s)" in err and "--keep-seconds below 10" in err


def test_the_same_session_goes_on_where_old_chunks_are_dropped(capsys):
    with FakeVLLM(max_model_len=170) as server:
        words = ("--fast", "--question", "Who?", "--json", "--keep-seconds", "8")
        code, lines, err = live(capsys, server, *words)
    rows = [json.loads(line) for line in lines]
    assert code == 0 and [(row["chunks"], row["forgotten_chunks"]) for row in rows] == [(1, 0), (2, 0), (1, 2)]
    assert rows[2]["new_tokens"] == 45 - 165 and "2 oldest chunk(s) forgotten" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--server"),
        (["--server", "http://127.0.0.1:9/v1/"], "no server answers at http://127.0.0.1:9/v1/models"),
        (["--server", "127.0.0.1:9"], "no server answers at http://127.0.0.1:9/v1/models"),
        (["--server", "x", "--chunk", "0.5"], "at least 2 frames"),
        (["--server", "x", "--every", "-1"], "--every"),
        (["--server", "x", "--rate", "2"], "--rate: got 2"),
        (["--server", "x", "--plain", "--rate", "0.5"], "--plain sends no evs_* keys, got evs_rate"),
        (["--server", "x", "--picture", "a.png"], "--picture needs --model"),
        (["--server", "x", "--picture", "a.gif", "--model", "."], "ends in .png"),
        (["--server", "x", "--picture", "/no/where/a.png", "--model", "."], "no folder /no/where"),
        (["--server", "x", "--picture", "a.png", "--model", "./none"], "no model folder"),
        (["--server", "x", "--picture", "a.png", "--model", ".", "--plain"], "leave one of them out"),
    ],
)
def test_errors_are_one_line(capsys, words, expected):
    try:
        code = main(["live", BIKES, *words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and expected in err


def test_keys_of_a_request():
    from evs_vllm.cli import make_parser

    def keys(*words):
        return request_keys(make_parser().parse_args(["live", "0", "--server", "x", *words]))

    assert keys() == {"evs_stream": True} and keys("--plain") == {}
    assert keys("--threshold", "20", "--positions", "sequential") == {
        "evs_stream": True, "evs_threshold": 20, "evs_positions": "sequential",
    }  # fmt: skip


# a camera in real time


class RealCamera:
    """50 frames a second, in real time."""

    def __init__(self, breaks_after=None):
        self.count, self.breaks_after, self.released = 0, breaks_after, False

    def grab(self):
        time.sleep(0.02)
        self.count += 1
        return self.count != self.breaks_after

    def retrieve(self):
        return True, np.full((16, 16, 3), self.count % 256, dtype=np.uint8)

    def get(self, prop):
        return -1

    def release(self):
        self.released = True


class Session:
    """`watch` on cameras, in this process; `taken` are the turns that the source gave."""

    def __init__(self, server, *cameras, chunk=0.2, seconds=3.0, **options):
        self.out, self.err, self.stop, self.taken = io.StringIO(), io.StringIO(), threading.Event(), []
        self.cameras = cameras
        report = Report(True, self.out, self.err)
        self.client = Client(Asking(server.url, None, 20, 9, {}, patience_s=20), report.notice)
        self.client.connect()
        left = iter(cameras)
        player = Player(
            Source("camera 0", 0, False), 20, self.stop, report.notice, opener=lambda target: next(left), **options
        )
        timer = threading.Timer(seconds, self.stop.set)
        timer.start()
        try:
            watch(
                lambda: map(self._note, Chunker(20, chunk).turns(player)),
                self.stop, self.client, Conversation("?", keep_s=2), report, waits=False,
            )  # fmt: skip
        finally:
            timer.cancel()
            self.rows = [json.loads(line) for line in self.out.getvalue().splitlines()]

    def _note(self, turn):
        self.taken.append((time.monotonic(), turn))
        return turn


def test_frames_are_dropped_where_the_server_is_slower_than_the_camera():
    with FakeVLLM(delay_s=0.5, max_model_len=10**6) as server:
        session = Session(server, RealCamera())
    rows, given = session.rows, sum(turn.frames + turn.skipped for _, turn in session.taken)
    dropped = sum(row["dropped_frames"] for row in rows)
    assert len(rows) >= 3 and dropped > 0
    assert sum(row["frames"] for row in rows) + dropped == given, "each frame is sent or counted"
    assert f"{dropped} frame(s) dropped" in session.err.getvalue()
    starts = [row["start_s"] for row in rows]
    assert starts == sorted(starts) and max(b - a for a, b in zip(starts, starts[1:])) > 0.3
    # What is asked next is the latest there was when the last answer came, not the next in a queue.
    last = rows[-1]["stop_s"]
    assert last == session.taken[-1][1].chunks[-1].stop
    assert session.cameras[0].released


def test_a_fast_server_gets_every_frame():
    with FakeVLLM(max_model_len=10**6) as server:
        session = Session(server, RealCamera(), chunk=0.5, seconds=2.2)
    assert sum(row["dropped_frames"] for row in session.rows) == 0 and len(session.rows) >= 4
    assert [row["start_s"] for row in session.rows] == [0.5 * n for n in range(len(session.rows))]


def test_a_camera_that_breaks_leaves_a_gap():
    with FakeVLLM(max_model_len=10**6) as server:
        session = Session(server, RealCamera(breaks_after=30), RealCamera(), chunk=0.5, seconds=3)
    assert "camera 0 is lost" in session.err.getvalue() and "camera 0 is back" in session.err.getvalue()
    assert all(camera.released for camera in session.cameras)
    assert session.rows[-1]["stop_s"] > 2 and session.rows[0]["start_s"] == 0


def test_a_lost_camera_ends_the_session_after_what_it_gave():
    class Lost(RealCamera):
        def grab(self):
            return False

    with FakeVLLM(max_model_len=10**6) as server:
        with pytest.raises(EVSError, match="did not come back within 0.1 s"):
            Session(server, RealCamera(breaks_after=40), *[Lost() for _ in range(9)], patience_s=0.1)
        assert server.seen >= 3


# Ctrl-C


def test_an_interrupt_ends_what_waits_and_nothing_else():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # not in the middle of this
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt), interrupt.waiting():
            pytest.fail("does not begin to wait")
    assert signal.getsignal(signal.SIGINT) is before
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.waiting():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(10)


def test_ctrl_c_closes_the_camera():
    with FakeVLLM(max_model_len=10**6) as server:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        session = Session(server, RealCamera(), seconds=60)
    assert session.cameras[0].released and session.stop.is_set() and session.rows
    assert session.err.getvalue().splitlines()[-1].startswith(f"stopped: {len(session.rows)} turn(s)")


def started(server, *words):
    command = [*LIVE, BIKES, "--server", server.url, "--chunk", "1", "--question", "?", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_between_turns_ends_with_a_summary(sign):
    with FakeVLLM() as server, started(server) as process:
        lines = [process.stdout.readline() for _ in range(3)]  # the head, two turns
        process.send_signal(sign)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "a man." in lines[2]
    assert out.splitlines()[-1].startswith("stopped: ") and "Traceback" not in err


def test_ctrl_c_in_the_middle_of_an_answer_finishes_the_line():
    words = ["a ", "man ", "who"] + [" walks"] * 500
    with FakeVLLM(answer=words, pause_s=0.1) as server, started(server, "--json") as process:
        while server.seen == 0:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    (row,) = map(json.loads, out.splitlines())
    assert row["answer"].startswith("a man who walks") and not row["complete"] and row["prompt_tokens"] is None
    assert "stopped: 1 turn(s), 1.0 s of video" in err and "Traceback" not in err


def test_ctrl_c_while_the_server_is_away():
    with FakeVLLM(script=lambda number: "break" if number else None) as server, started(server) as process:
        while server.seen < 2:
            time.sleep(0.05)
        server.healthy = False
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err, err


def test_a_closed_pipe_is_no_error():
    with FakeVLLM() as server:
        words = " ".join([f"'{BIKES}' --server {server.url} --fast --chunk 1"])
        command = " ".join(f"'{word}'" for word in LIVE[:4]) + f" live {words}"
        done = subprocess.run(["bash", "-c", f"{command} | head -2"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr


# lines


def test_what_is_not_known_is_a_dash():
    row = Row(1, 0, 4, 8, 2, 1, 0, None, None, 4000, None, None, None, "it\n moves", complete=False)
    assert row.line().split() == ["4.0", "s", "-", "-", "-", "-", "2", "it", "moves", "[interrupted]"]
    assert Row(1, 0, 4, 8, 0, 1, 0, -120, 45, None, 7, 3, 0.25, "x").line().split() == [
        "4.0", "s", "-120", "45", "7", "250", "ms", "0", "x",
    ]  # fmt: skip
