# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, for as long as a block lasts."""

import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from evs_vllm.errors import EVSError
from evs_vllm.serving.processes import running, tail
from evs_vllm.serving.status import healthy


def vllm_serve(arguments: Sequence[str]) -> list[str]:
    """The command ``vllm serve`` of this environment with `arguments`."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]


@contextlib.contextmanager
def starting(
    command: Sequence[str], log: Path, env: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs a server's `command` on a free port of this machine.

    Args:
        command: Without host and port, which are added.
        log: Where its output goes.
        env: Its environment.

    Yields:
        The base URL, without a slash at the end, where it will answer once it is healthy; and its process.
    """
    port = free_port()
    with running([*command, "--host", "127.0.0.1", "--port", str(port)], log, env) as process:
        yield f"http://127.0.0.1:{port}", process


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], timeout_s: float, waiting: Callable[[float], None] | None = None
) -> None:
    """Returns when the server at `url` answers.

    Args:
        url: The server's base URL, without ``/v1``.
        process: Its process.
        timeout_s: How long it may take.
        waiting: Called about twice a second with the seconds waited so far.

    Raises:
        EVSError: It ended or did not become healthy in time.
    """
    started = time.monotonic()
    while not healthy(url):
        waited = time.monotonic() - started
        code = process.poll()
        if code is not None:
            raise EVSError(f"the server ended with code {code}")
        if waited > timeout_s:
            raise EVSError(f"the server was not healthy after {timeout_s:.0f} s")
        if waiting is not None:
            waiting(waited)
        time.sleep(0.5)


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    timeout_s: float,
    waiting: Callable[[float], None] | None = None,
) -> Iterator[str]:
    """Runs a server while the block lasts; see `starting` and `wait_until_healthy` for the arguments.

    Yields:
        The base URL of the healthy server, without a slash at the end.

    Raises:
        EVSError: It ended or did not become healthy in time; the end of the log is on stderr.
    """
    with starting(command, log, env) as (url, process):
        try:
            wait_until_healthy(url, process, timeout_s, waiting)
        except EVSError:
            show_tail(log)
            raise
        yield url


def show_tail(log: Path) -> None:
    """Prints the end of a log to stderr."""
    print("\n" + "\n".join(f"  | {line}" for line in tail(log)), file=sys.stderr)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    # Below the range that systems hand out by themselves: a server binds its port only after it has imported vLLM, and
    # by then anybody's connection may have been given one of those.
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
