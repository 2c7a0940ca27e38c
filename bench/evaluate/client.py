# SPDX-License-Identifier: Apache-2.0
"""Asks a running vLLM server about videos through the OpenAI client, a fixed number of requests in flight."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from evs_vllm.errors import EVSError
from evs_vllm.serving import Answer, is_local, metrics, read_url, video_part

COUNTERS = ("evs:clips_total", "evs:video_tokens_total", "evs:video_tokens_kept_total")
VIDEO_AS = ("data", "file")
REMOTE = ("http://", "https://", "file://", "data:")
PASSED_ON = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
START = "vllm serve MODEL --evs-rate 0 --evs-request-overrides any"


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        turns: Chat turns; the parts of a content are ``{"type": "text", "text": ...}`` and ``{"type": "video", "url":
            ...}``, the latter a path on this machine or a URL.
        generation: What goes into the request beside them: max_tokens, temperature, stop, ...
    """

    turns: Sequence[Mapping[str, Any]]
    generation: Mapping[str, Any]

    @property
    def videos(self) -> int:
        return sum(part["type"] == "video" for turn in self.turns for part in turn["content"])


class Client:
    """A server that has been found to answer, and the name of its model."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        concurrency: int = 8,
        video_as: str = "data",
        body: Mapping[str, Any] | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        """
        Args:
            url: of the server, with or without ``/v1``.
            model: the name it serves; may be left out where it serves one.
            concurrency: requests in flight.
            video_as: "data" puts the file into the request, "file" its path, which the server then reads.
            body: further fields of every request that are vLLM's own, such as ``media_io_kwargs``.
            timeout_s: for one request.

        Raises:
            EVSError: nobody answers at `url`, or not with this model.
        """
        if video_as not in VIDEO_AS:
            raise EVSError(f"video_as got {video_as!r}; allowed: {', '.join(VIDEO_AS)}")
        self.root = url.rstrip("/").removesuffix("/v1")
        self._concurrency, self._video_as, self._body = concurrency, video_as, dict(body or {})
        self._timeout_s = timeout_s
        names = [entry.id for entry in asyncio.run(self._with_client(self._models))]
        if model is None and len(names) != 1:
            raise EVSError(f"{self.root} serves {', '.join(names) or 'no model'}: say which with --model")
        if model is not None and model not in names:
            raise EVSError(f"{self.root} does not serve {model!r}; it serves {', '.join(names)}")
        self.model = model or names[0]

    def run(self, asks: Sequence[Ask], options: Mapping[str, Any]) -> list[Answer]:
        """Asks everything; answers in the order of `asks`.

        Args:
            asks: the questions.
            options: ``mm_processor_kwargs`` of every request, such as ``{"evs_rate": 0.75}``.

        Raises:
            EVSError: a request failed, with the server's own words; the others are given up.
        """

        async def everything(client: openai.AsyncOpenAI) -> list[Answer]:
            free = asyncio.Semaphore(self._concurrency)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(client, free, ask, options)) for ask in asks]
            return [task.result() for task in tasks]

        try:
            return asyncio.run(self._with_client(everything))
        except BaseExceptionGroup as group:  # the first one is the cause, and the others mostly the same
            raise group.exceptions[0] from None

    def counters(self) -> dict[str, float] | None:
        """The plugin's counters in ``/metrics``, or None where nobody shows them."""
        try:
            found = metrics(self.root)
        except OSError:
            return None
        return {name: found.get(name, 0.0) for name in COUNTERS}

    def server_version(self) -> str | None:
        """vLLM's version, as the server says it."""
        try:
            return str(json.loads(read_url(f"{self.root}/version"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    async def _with_client(self, use: Any) -> Any:
        http = httpx.AsyncClient(
            trust_env=not is_local(self.root), timeout=self._timeout_s, limits=httpx.Limits(max_connections=None)
        )
        key = os.environ.get("OPENAI_API_KEY", "EMPTY")
        async with openai.AsyncOpenAI(
            base_url=f"{self.root}/v1", api_key=key, http_client=http, timeout=self._timeout_s, max_retries=2
        ) as client:
            try:
                return await use(client)
            except openai.OpenAIError as error:
                raise self._said(error) from error

    async def _models(self, client: openai.AsyncOpenAI) -> Any:
        return (await client.with_options(timeout=30, max_retries=0).models.list()).data

    async def _ask(
        self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, ask: Ask, options: Mapping[str, Any]
    ) -> Answer:
        async with free:  # before the files are read: as many in memory as in flight
            turns = await asyncio.to_thread(openai_turns, ask.turns, self._video_as)
            try:
                completion = await client.chat.completions.create(
                    model=self.model,
                    messages=turns,
                    extra_body={**self._body, "mm_processor_kwargs": dict(options)},
                    **ask.generation,
                )
            except openai.OpenAIError as error:
                raise self._said(error) from error
        usage = completion.usage
        if usage is None or not completion.choices:
            raise EVSError(f"{self.root} gave an answer without usage or choices: {str(completion)[:300]}")
        return Answer(completion.choices[0].message.content or "", usage.prompt_tokens, usage.completion_tokens)

    def _said(self, error: openai.OpenAIError) -> EVSError:
        if isinstance(error, openai.APITimeoutError):
            return EVSError(f"{self.root} gave no answer in time ({self._timeout_s:g} s a request: timeout_s)")
        if isinstance(error, openai.APIConnectionError):
            return EVSError(f"no server answers at {self.root} ({error.__cause__ or error}). Start one: {START}")
        if isinstance(error, openai.APIStatusError):
            body = error.body
            text = body.get("message") if isinstance(body, Mapping) else None
            return EVSError(f"HTTP {error.status_code} from {self.root}: {text or error.response.text[:500]}")
        return EVSError(f"{type(error).__name__}: {error}")


def openai_turns(turns: Sequence[Mapping[str, Any]], video_as: str) -> list[dict[str, Any]]:
    """Turns as an OpenAI server takes them; see `Ask` for how they come.

    Raises:
        EVSError: a video is missing, or a part is neither text nor video: EVS would do nothing for it.
    """
    return [
        {"role": turn["role"], "content": [_openai_part(part, video_as) for part in turn["content"]]} for turn in turns
    ]


def _openai_part(part: Mapping[str, Any], video_as: str) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    url = part.get("url")
    if part["type"] != "video" or not isinstance(url, str):
        raise EVSError(
            f"a question has a part of type {part['type']!r} ({type(url).__name__}); EVS prunes videos, so what is "
            "evaluated here are questions about video files"
        )
    if not url.startswith(REMOTE):
        path = Path(url).expanduser()
        if path.is_dir():
            raise EVSError(f"{path} is a folder of frames, not a video file: leave this task out")
        if not path.is_file():
            raise EVSError(f"no such video: {path}")
        return video_part(path.absolute().as_uri() if video_as == "file" else path)
    return video_part(url)


def generation_of(asked: Mapping[str, Any], max_tokens: int | None) -> dict[str, Any]:
    """A task's ``generation_kwargs``, which are named as in transformers, in the names of the OpenAI API.

    Raises:
        EVSError: beam search, which the server does not do.
    """
    if asked.get("num_beams", 1) not in (None, 1):
        raise EVSError(f"the task wants num_beams {asked['num_beams']}; the server has no beam search")
    out = {name: asked[name] for name in PASSED_ON if asked.get(name) is not None}
    if not asked.get("do_sample"):
        out |= {"temperature": 0}
        out.pop("top_p", None)
    out["max_tokens"] = max_tokens or asked.get("max_new_tokens") or 16
    if until := asked.get("until"):
        out["stop"] = [until] if isinstance(until, str) else list(until)
    return out
