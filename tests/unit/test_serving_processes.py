# SPDX-License-Identifier: Apache-2.0
"""evs_vllm.serving: ports, processes that end as a group, and servers."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evs_vllm import serving
from evs_vllm.errors import EVSError
from evs_vllm.serving import free_port, run_to_end, running


def test_free_ports_are_free_and_below_the_systems_range():
    ports = [free_port() for _ in range(20)]
    assert all(15000 <= port < 30000 for port in ports) and len(set(ports)) > 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports[-1]))


def test_a_port_in_use_is_not_given(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        port, other = taken.getsockname()[1], free_port()
        numbers = iter([port, port, other])
        monkeypatch.setattr(random, "randrange", lambda *limits: next(numbers))
        assert free_port() == other != port


# A leader that starts a child, says its number and waits; the child shuts its ears.
FAMILY = """
import subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def said(log: Path) -> int:
    """The number in a log, once it is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().endswith("\n"):
            return int(log.read_text())
        time.sleep(0.05)
    pytest.fail("no word from the process")


def ends(process: int) -> bool:
    """Whether a process is gone within ten seconds: being killed takes a moment."""
    deadline = time.monotonic() + 10
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(process)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")


@needs_proc
def test_a_group_ends_with_its_block(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ZeroDivisionError), running([sys.executable, "-c", FAMILY], log, os.environ) as process:
        child = said(log)
        assert alive(child) and alive(process.pid)
        1 / 0  # noqa: B018
    assert process.returncode == -signal.SIGTERM and ends(child)


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children of a killed process")
def test_a_process_ends_with_a_parent_that_is_killed(tmp_path):
    log = tmp_path / "log"
    code = (
        "import os, sys, time, pathlib\nfrom evs_vllm.serving import running\n"
        f"words = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)']\n"
        f"with running(words, pathlib.Path({str(log)!r}), os.environ): time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = said(log)
    assert alive(child)
    parent.kill()
    parent.wait()
    assert ends(child)


def test_the_last_error_of_a_command_is_told(tmp_path):
    log = tmp_path / "log"
    run_to_end([sys.executable, "-c", "print('fine')"], log, os.environ)
    assert log.read_text() == "fine\n"
    code = "import sys; print('ValueError: too small'); print('bye'); sys.exit(3)"
    with pytest.raises(EVSError, match="^ValueError: too small$"):
        run_to_end([sys.executable, "-c", code], log, os.environ)
    with pytest.raises(EVSError, match="failed without a word"):
        run_to_end([sys.executable, "-c", "raise SystemExit(1)"], log, os.environ)


STUB = """
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


def test_a_server_serves_as_long_as_its_block(tmp_path):
    waited = []
    with serving.serving([sys.executable, "-c", STUB], tmp_path / "log", os.environ, 30, waited.append) as url:
        assert serving.healthy(url)
    assert not serving.healthy(url)


@pytest.mark.parametrize(
    ("code", "message"),
    [("exit('no memory')", "ended with code 1"), ("import time; time.sleep(9)", "healthy after 1 s")],
)
def test_a_server_that_does_not_start_shows_its_log(code, message, tmp_path, capsys):
    timeout_s = 1 if "sleep" in code else 30
    server = serving.serving([sys.executable, "-c", code], tmp_path / "log", os.environ, timeout_s)
    with pytest.raises(EVSError, match=message), server:
        pytest.fail("it is not healthy")
    assert ("  | no memory" in capsys.readouterr().err) == ("exit" in code)
