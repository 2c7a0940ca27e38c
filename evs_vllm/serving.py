# SPDX-License-Identifier: Apache-2.0
"""Starts a vLLM server, asks it, and reads its counters: for the demo, the benchmarks and the tests.

Needs the standard library only, so that whoever asks a server needs neither vLLM nor torch. Whatever is started here
ends with the block that started it: each process has a process group of its own, which is ended as a whole.
"""

import base64
import contextlib
import ctypes
import http.client
import json
import math
import mimetypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evs_vllm.errors import EVSError, ServerError

LOG_TAIL = 25
"""Lines of a log to show when its process failed."""

# Of a metric: its name, labels in quotes that may hold anything, its value, a time.
_SAMPLE = re.compile(
    r'([A-Za-z_:][\w:]*)(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?'
    r"\s+([+-]?(?:[\d.]+(?:[eE][+-]?\d+)?|Inf|NaN))(?:\s+-?\d+)?"
)


# ---------------------------------------------------------------- processes


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


# ---------------------------------------------------------------- servers


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


# ---------------------------------------------------------------- what a server says


def is_local(url: str) -> bool:
    """Whether a URL points to this machine: a proxy of the environment has no business on the way there."""
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    proxies = urllib.request.ProxyHandler({} if is_local(request.full_url) else None)
    return urllib.request.build_opener(proxies).open(request, timeout=timeout_s)


def read_url(url: str, timeout_s: float = 30.0, headers: Mapping[str, str] | None = None) -> str:
    """The text at `url`; `headers` go along with the request.

    Raises:
        OSError: Nobody answers, or not with the code 200.
    """
    try:
        with _open(urllib.request.Request(url, headers=dict(headers or {})), timeout_s) as answer:
            text: str = answer.read().decode()
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {error!r}") from error
    return text


def healthy(url: str) -> bool:
    """Whether the server at `url` is ready for requests."""
    try:
        read_url(f"{url}/health", timeout_s=5)
        return True
    except OSError:
        return False


def metrics(url: str) -> dict[str, float]:
    """What the server's ``/metrics`` says now, as `parse_metrics` reads it.

    Raises:
        OSError: It does not answer, or shows no metrics.
    """
    return parse_metrics(read_url(f"{url}/metrics"))


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus' text format by name, summed over their labels.

    The sum and the count of a histogram are samples of their own; its buckets, which overlap, are left out.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is not None and not sample[1].endswith("_bucket"):
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[2])
    return found


# ---------------------------------------------------------------- requests


class Answer(NamedTuple):
    """One answer.

    Attributes:
        text: The text.
        prompt_tokens: Tokens of the prompt, as the server counts them.
        output_tokens: Tokens of the answer, as the server counts them.
        ttft_s: From sending the request to the first text, in seconds; NaN where none came, or not as a stream.
        cached_tokens: Tokens of the prompt that the server took from its prefix cache, or None where it does not say
            (``vllm serve --enable-prompt-tokens-details`` does).
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float = math.nan
    cached_tokens: int | None = None


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    """The content of a file as a ``data:`` URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video_part(video: Path | str) -> dict[str, Any]:
    """A video as a part of an OpenAI request: a file goes into the request, a URL is passed on."""
    if isinstance(video, Path):
        # vLLM decides by "video/jpeg" or not; what is in the file, its decoder finds out by itself.
        kind = mimetypes.guess_type(video.name)[0] or ""
        video = data_url(video.read_bytes(), kind if kind.startswith("video/") else "video/mp4")
    return {"type": "video_url", "video_url": {"url": video}}


def event_of(line: bytes) -> dict[str, Any] | None:
    """The chunk of an answer in one line of a stream, or None where the line carries none."""
    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
        return None
    content: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return content


def ask(
    url: str,
    model: str,
    video: dict[str, Any],
    question: str,
    max_tokens: int,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = 600.0,
) -> Answer:
    """Asks about a video, greedily, and reads the stream.

    Args:
        url: The server's base URL, without ``/v1``.
        model: Its name there.
        video: From `video_part`.
        question: The text after the video.
        max_tokens: Longest answer.
        body: Further keys of the request, such as ``mm_processor_kwargs``.
        timeout_s: How long the server may say nothing.

    Raises:
        ServerError: The server refused it, or did not answer it.
        EVSError: The answer has no text.
    """
    content = [video, {"type": "text", "text": question}]
    answer = chat(
        url,
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **(body or {}),
        },
        timeout_s,
    )
    if math.isnan(answer.ttft_s):
        raise EVSError("the server answered without any text")
    return answer


def chat(
    url: str,
    body: Mapping[str, Any],
    timeout_s: float = 600.0,
    headers: Mapping[str, str] | None = None,
    heard: Callable[[str], None] | None = None,
) -> Answer:
    """Sends a chat request and reads the stream.

    Args:
        url: The server's base URL, without ``/v1``.
        body: The request, without what asks for a stream.
        timeout_s: How long the server may say nothing.
        headers: HTTP headers beside that of the content's type.
        heard: Called with each piece of the answer's text as it comes.

    Returns:
        The answer; its text may be empty.

    Raises:
        ServerError: The server refused it, or did not answer it to its end.
    """
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    text, first, usage = "", math.nan, None
    started = time.perf_counter()
    try:
        with _open(request, timeout_s) as lines:
            for line in lines:
                chunk = event_of(line) or {}
                if "error" in chunk:
                    code = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
                    raise ServerError(
                        f"the server gave up: {chunk['error']}",
                        str(chunk["error"]),
                        code if isinstance(code, int) else None,
                    )
                choices = chunk.get("choices")
                piece = (choices[0]["delta"].get("content") if choices else None) or ""
                if piece:
                    first = time.perf_counter() - started if math.isnan(first) else first
                    text += piece
                    if heard is not None:
                        heard(piece)
                usage = chunk.get("usage") or usage
    except urllib.error.HTTPError as error:
        words = _message(error)
        raise ServerError(f"the server refused the request: HTTP {error.code}: {words}", words, error.code) from None
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise ServerError(f"the server did not answer: {error}", str(error)) from None
    if usage is None:  # a server that is killed may close the connection as if it had said all
        raise ServerError("the server's answer broke off", "the answer broke off")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], first, cached)


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words in the answer to a request that it refused."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
