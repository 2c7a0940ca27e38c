# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive the command: each has a process group of its own, which is ended as a whole."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from evs_vllm.errors import EVSError

LOG_TAIL = 25
"""Lines of a log to show when its process failed."""

# Servers are local: a proxy of the environment has no business here.
_open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Lets Ctrl-C, SIGTERM and SIGHUP unwind the stack, also where the shell had them ignored."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command`, its output in the file `log`; when the block is left, its whole process group is gone."""
    blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    with log.open("wb") as out:
        # A signal between the start and the try would leave the process behind.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, old_mask),
            )
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
                yield process
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
                _end_group(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _end_group(process: subprocess.Popen[bytes], patience_s: float = 6.0) -> None:
    """Asks the leader to stop, then kills what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    deadline = time.monotonic() + 3  # children that are about to follow their parent
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_to_end(command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
    """Runs `command` to its end.

    Raises:
        EVSError: It failed; the text is the last line that it wrote about an error.
    """
    with running(command, log, env) as process:
        if process.wait():
            lines = tail(log)
            about = [line for line in lines if "error" in line.lower()] or lines
            raise EVSError(about[-1] if about else f"{command[0]} failed without a word")


@contextlib.contextmanager
def serving(
    arguments: Sequence[str], log: Path, env: Mapping[str, str], timeout_s: float, waiting: Callable[[float], None]
) -> Iterator[str]:
    """Runs ``vllm serve`` with `arguments` on a free port of this machine.

    Args:
        arguments: Words after ``vllm serve``, without host and port.
        log: Where its output goes.
        env: Its environment.
        timeout_s: How long it may take to become healthy.
        waiting: Called about once a second with the seconds waited so far.

    Yields:
        The base URL of the healthy server, without a slash at the end.

    Raises:
        EVSError: It ended or did not become healthy in time; the end of the log is on stderr.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    with running([*command, "--host", "127.0.0.1", "--port", str(port)], log, env) as process:
        url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        while not _healthy(url):
            waited = time.monotonic() - started
            code = process.poll()
            if code is not None or waited > timeout_s:
                print("\n" + "\n".join(f"  | {line}" for line in tail(log)), file=sys.stderr)
                what = f"ended with code {code}" if code is not None else f"was not healthy after {timeout_s:.0f} s"
                raise EVSError(f"the server {what}")
            waiting(waited)
            time.sleep(1)
        yield url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def read_url(url: str) -> str:
    with _open_url(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def _healthy(url: str) -> bool:
    try:
        with _open_url(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path, count: int = LOG_TAIL) -> list[str]:
    """The last lines of a log that are not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-count:]
