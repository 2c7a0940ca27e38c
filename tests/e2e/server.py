# SPDX-License-Identifier: Apache-2.0
"""A real OpenAI server in a process of its own, and requests to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from evs_vllm import serving
from evs_vllm.serving import data_url, video_part

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


def server_env() -> dict[str, str]:
    """The environment of a server: that of the tests, but for what is only for engines inside the test's process."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**env, "VLLM_LOGGING_LEVEL": "INFO"}


@contextlib.contextmanager
def started(command: Sequence[str], log_file: Path, more_env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Starts `command` on a free port, waits until it is healthy, and ends its whole process group."""
    env = {**server_env(), **(more_env or {})}
    with serving.serving(command, log_file, env, START_TIMEOUT_S) as url:
        yield Server(url, log_file)


def encode_frames(frames: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A clip as a `video_url` part (JPEGs, one per second), and the frames that the server will decode."""
    from PIL import Image

    parts, decoded = [], []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=90)
        parts.append(base64.b64encode(buffer.getvalue()).decode())
        decoded.append(np.asarray(Image.open(buffer).convert("RGB")))
    return video_part("data:video/jpeg;base64," + ",".join(parts)), np.stack(decoded)


def encode_image(pixels: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"type": "image_url", "image_url": {"url": data_url(buffer.getvalue(), "image/png")}}


def body(parts: Sequence[dict[str, Any] | str], max_tokens: int = 12, **more: Any) -> dict[str, Any]:
    """A greedy chat request; plain strings become text parts. Tokens come back as ids beside the text."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {
        "messages": [{"role": "user", "content": content}], "temperature": 0, "max_completion_tokens": max_tokens,
        "ignore_eos": True, "logprobs": True, "top_logprobs": 5, "return_token_ids": True,
        "return_tokens_as_token_ids": True, **more,
    }  # fmt: skip
