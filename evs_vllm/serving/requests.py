# SPDX-License-Identifier: Apache-2.0
"""Chat requests to a server."""

import base64
import http.client
import json
import math
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evs_vllm.errors import EVSError, ServerError
from evs_vllm.serving.status import open_url


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
        with open_url(request, timeout_s) as lines:
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
                if chunk.get("usage"):
                    usage = _usage(chunk["usage"])
    except urllib.error.HTTPError as error:
        words = _message(error)
        raise ServerError(f"the server refused the request: HTTP {error.code}: {words}", words, error.code) from None
    except (OSError, http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ServerError(f"the server did not answer: {error}", str(error)) from None
    except (AttributeError, LookupError, TypeError) as error:
        raise ServerError(f"the server's answer is none of vLLM's: {error!r}", repr(error)) from None
    if usage is None:  # a server that is killed may close the connection as if it had said all
        raise ServerError("the server's answer broke off", "the answer broke off")
    return Answer(text, *usage[:2], first, usage[2])


def _usage(counted: Mapping[str, Any]) -> tuple[int, int, int | None]:
    """Tokens of the prompt and of the answer, and how many of the prompt's were cached, if the server says so."""
    cached = (counted.get("prompt_tokens_details") or {}).get("cached_tokens")
    return counted["prompt_tokens"], counted["completion_tokens"], cached


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words in the answer to a request that it refused."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):  # it broke off, or hangs
        return str(error.reason)
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
