# SPDX-License-Identifier: Apache-2.0
"""The client: streamed chat completions with a video against an OpenAI endpoint, a fixed number of them in flight."""

import asyncio
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp

from evs_vllm.serving import event_of, video_part

TIMEOUT_S = 1800.0


@dataclass
class Sample:
    """One request.

    Attributes:
        ttft_s: from sending the request to the first chunk with text in it.
        e2e_s: from sending the request to the end of the stream.
        prompt_tokens: as the server counts them.
        output_tokens: as the server counts them.
        text: the answer.
        error: what went wrong, or None.
        cached_tokens: of the prompt, found in the prefix cache, where the server says (--enable-prompt-tokens-details).
    """

    ttft_s: float = 0.0
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None
    cached_tokens: int = 0


def messages(video: Path, question: str) -> list[dict[str, Any]]:
    """One user turn: a video, in the request itself, then a question."""
    content = [video_part(video), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def body(model: str, turns: list[dict[str, Any]], output_tokens: int, processor_options: dict[str, Any]) -> bytes:
    """A request that gives exactly `output_tokens` tokens, greedily."""
    content: dict[str, Any] = {
        "model": model,
        "messages": turns,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if processor_options:
        content["mm_processor_kwargs"] = processor_options
    return json.dumps(content).encode()


def text_tokens(model: str, turns: list[dict[str, Any]]) -> int:
    """Tokens of a prompt but for its videos', counted on this side, with the model's own tokenizer and template."""
    tokenizer = _tokenizer(model)
    lists = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    videos = sum(part["type"] != "text" for content in lists for part in content)
    bare = [
        {**turn, "content": [part if part["type"] == "text" else {"type": "video"} for part in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in turns
    ]
    prompt = tokenizer.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(prompt, add_special_tokens=False)) - videos  # one placeholder stands for each


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def run(url: str, bodies: list[bytes], concurrency: int) -> tuple[list[Sample], float]:
    """Sends all requests, `concurrency` of them at a time; samples in the order of `bodies`, and the seconds."""
    return asyncio.run(_run(url, bodies, concurrency))


async def _run(url: str, bodies: list[bytes], concurrency: int) -> tuple[list[Sample], float]:
    in_flight = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    # Not the environment's proxy: the servers are local.
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as session:

        async def one(content: bytes) -> Sample:
            async with in_flight:
                return await _ask(session, url, content)

        started = time.perf_counter()
        samples = await asyncio.gather(*(one(content) for content in bodies))
        return list(samples), time.perf_counter() - started


async def _ask(session: aiohttp.ClientSession, url: str, content: bytes) -> Sample:
    sample, first = Sample(), None
    started = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{url}/v1/chat/completions", data=content, headers=headers) as answer:
            if answer.status != 200:
                sample.error = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                return sample
            async for line in answer.content:
                chunk = event_of(line) or {}
                if "error" in chunk:
                    sample.error = str(chunk["error"])[:300]
                    return sample
                piece = chunk["choices"][0]["delta"].get("content") if chunk.get("choices") else None
                if piece and first is None:
                    first = time.perf_counter() - started
                sample.text += piece or ""
                if usage := chunk.get("usage"):
                    sample.prompt_tokens = usage["prompt_tokens"]
                    sample.output_tokens = usage["completion_tokens"]
                    sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (aiohttp.ClientError, TimeoutError) as error:
        sample.error = f"{type(error).__name__}: {error}"
        return sample
    sample.e2e_s = time.perf_counter() - started
    if first is None:
        sample.error = "an answer without text"
    else:
        sample.ttft_s = first
    return sample
