# SPDX-License-Identifier: Apache-2.0
"""Processes that end with the block that started them: each has a process group of its own, ended as a whole."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evs_vllm.errors import EVSError

LOG_TAIL = 25
"""Lines of a log to show when its process failed."""


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
    # Looked up before the fork: after it, a lock that another thread held is never released.
    end_with_parent = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with log.open("wb") as out:
        # A signal between the start and the try would leave the process behind.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
            if end_with_parent is not None:  # nothing unwinds in a parent that is killed
                end_with_parent(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
                preexec_fn=prepare,
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


def tail(log: Path, count: int = LOG_TAIL) -> list[str]:
    """The last lines of a log that are not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-count:]
