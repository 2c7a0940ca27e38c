# SPDX-License-Identifier: Apache-2.0
"""What the demo asks of a server: one OpenAI chat request with a video, timed, and the counters of ``/metrics``."""

import base64
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from evs_vllm.cli._servers import read_url
from evs_vllm.errors import EVSError


class Answer(NamedTuple):
    """One answer.

    Attributes:
        prompt_tokens: Tokens of the prompt, as the server counts them.
        ttft_s: From sending the request to the first text, in seconds.
        text: The text.
    """

    prompt_tokens: int
    ttft_s: float
    text: str


def data_url(video: Path) -> str:
    """A video file as a ``data:`` URL."""
    return f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"


def ask(
    url: str, model: str, video_url: str, question: str, max_tokens: int, extra_body: dict[str, Any] | None = None
) -> Answer:
    """Sends the request and reads the stream.

    Args:
        url: Of the server, without ``/v1``.
        model: Its name there.
        video_url: A URL that the server reads, or a ``data:`` URL.
        question: The text after the video.
        max_tokens: Longest answer.
        extra_body: Further keys of the body, such as ``mm_processor_kwargs``.

    Raises:
        EVSError: The server refused it.
    """
    import openai

    # No proxy of the environment, and no retries in a timed request.
    http = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600, http_client=http)
    content: Any = [{"type": "video_url", "video_url": {"url": video_url}}, {"type": "text", "text": question}]
    prompt_tokens, first, text = 0, None, ""
    started = time.perf_counter()
    try:
        with (
            client,
            client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra_body,
            ) as chunks,
        ):
            for chunk in chunks:
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece and first is None:
                    first = time.perf_counter() - started
                text += piece or ""
                prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else prompt_tokens
    except openai.OpenAIError as error:
        raise EVSError(f"the server refused the request: {error}") from None
    if first is None:
        raise EVSError("the server answered without any text")
    return Answer(prompt_tokens, first, text)


def video_tokens(url: str) -> tuple[float, float]:
    """Video tokens (before, kept) of all clips that a server with EVS has processed."""
    text = read_url(f"{url}/metrics")

    def total(name: str) -> float:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    return total("evs:video_tokens_total"), total("evs:video_tokens_kept_total")
