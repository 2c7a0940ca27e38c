# SPDX-License-Identifier: Apache-2.0
"""A real OpenAI server in a process of its own, and requests to it."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

START_TIMEOUT_S = 600  # half a minute on an idle machine
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
"""What the chat template puts first."""

SERVE = [str(shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm"), "serve"]
API_SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
COMMON = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8", "--seed", "0"]


@dataclass
class Server:
    """A server that answers at `url`; `log` is all it printed."""

    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def post(self, body: dict[str, Any] | str, path: str = "/v1/chat/completions") -> httpx.Response:
        # Python's JSON writes NaN and Infinity, httpx's refuses to: a client may send anything.
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=120, trust_env=False)

    def metrics(self, prefix: str = "evs:") -> dict[str, float]:
        """Samples of `/metrics` by name, summed over labels."""
        out: dict[str, float] = {}
        for line in httpx.get(self.url + "/metrics", timeout=30, trust_env=False).text.splitlines():
            if line.startswith(prefix) and "_bucket" not in line:
                name, value = line.split("{")[0].split()[0], line.split()[-1]
                out[name] = out.get(name, 0.0) + float(value)
        return out


@contextlib.contextmanager
def serving(command: Sequence[str], log_file: Path) -> Iterator[Server]:
    """Starts `command` with a free port added, waits until it is healthy, and ends its whole process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env["VLLM_LOGGING_LEVEL"] = "INFO"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
    try:
        server = Server(f"http://127.0.0.1:{port}", log_file)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (exit code {process.poll()}):\n{server.log[-5000:]}")
            time.sleep(0.3)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """Linux ends the server when the test process dies without cleaning up."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(server.url + "/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def encode_frames(frames: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A clip as a `video_url` part (JPEGs, one per second), and the frames that the server will decode."""
    from PIL import Image

    parts, decoded = [], []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=90)
        parts.append(base64.b64encode(buffer.getvalue()).decode())
        decoded.append(np.asarray(Image.open(buffer).convert("RGB")))
    url = "data:video/jpeg;base64," + ",".join(parts)
    return {"type": "video_url", "video_url": {"url": url}}, np.stack(decoded)


def encode_file(path: Path) -> dict[str, Any]:
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": url}}


def encode_image(pixels: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def body(parts: Sequence[dict[str, Any] | str], max_tokens: int = 12, **more: Any) -> dict[str, Any]:
    """A greedy chat request; plain strings become text parts. Tokens come back as ids beside the text."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {
        "messages": [{"role": "user", "content": content}], "temperature": 0, "max_completion_tokens": max_tokens,
        "ignore_eos": True, "logprobs": True, "top_logprobs": 5, "return_token_ids": True,
        "return_tokens_as_token_ids": True, **more,
    }  # fmt: skip
