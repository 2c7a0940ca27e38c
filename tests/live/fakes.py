# SPDX-License-Identifier: Apache-2.0
"""Stands in for cameras, for their clock, and for vLLM's server."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from aiohttp import web

from tests.unit.local_server import LocalServer


class Clock:
    """Time that passes only where somebody waits; also an event that is set at `end`."""

    def __init__(self, end: float = float("inf")) -> None:
        self.now, self.end, self.waits = 100.0, 100.0 + end, []

    def __call__(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return self.now >= self.end

    def wait(self, timeout: float) -> bool:
        self.waits.append(timeout)
        self.now = min(self.now + timeout, self.end)
        return self.is_set()


class Camera:
    """A capture of pictures that say their number: frame i has the grey level i.

    Args:
        times: When each frame is there, in seconds of the clock after the first `grab`; None fails.
        clock: Waited on by `grab`; None for a file, whose frames have these times.
        size: (height, width).
    """

    def __init__(
        self,
        times: Sequence[float | None],
        clock: Clock | None = None,
        size: tuple[int, int] = (16, 24),
        rate: float = 0,
    ) -> None:
        self.times, self.clock, self.size, self.rate = list(times), clock, size, rate
        self.at, self.released, self.retrieved, self.started = -1, False, 0, None

    def grab(self) -> bool:
        assert not self.released
        self.at += 1
        if self.at >= len(self.times) or self.times[self.at] is None:
            return False
        if self.clock is not None:
            self.started = self.clock.now if self.started is None else self.started
            self.clock.now = max(self.clock.now, self.started + self.times[self.at])
        return True

    def retrieve(self) -> tuple[bool, Any]:
        self.retrieved += 1
        return True, np.full((*self.size, 3), self.at % 256, dtype=np.uint8)

    def get(self, prop: int) -> float:
        import cv2

        if prop == cv2.CAP_PROP_POS_MSEC:
            return 1e3 * (self.times[self.at] if self.clock is None else 0)
        if prop == cv2.CAP_PROP_FPS:
            return self.rate
        return len(self.times) if self.clock is None else -1

    def release(self) -> None:
        self.released = True


def level(jpeg: bytes) -> int:
    """The grey level of an encoded frame of `Camera`."""
    import cv2

    return round(float(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE).mean()))


class FakeVLLM(LocalServer):
    """Answers as ``vllm serve`` does: 10 tokens a frame, 1 a character of text; the prefix cache is exact.

    Args:
        max_model_len: A longer prompt is HTTP 400.
        delay_s: Seconds to the first text.
        trusts: Takes ``media_io_kwargs`` from requests.
        details: Says how many tokens were cached.
        script: Called with the number of a chat request, from 0, before it is answered; a response is sent instead,
            "break" closes the connection in the middle of the answer.
    """

    def __init__(
        self,
        max_model_len: int = 1000,
        delay_s: float = 0.0,
        trusts: bool = True,
        details: bool = True,
        script: Callable[[int], Any] = lambda number: None,
        answer: Sequence[str] = ("a ", "man", "."),
        pause_s: float = 0.0,
        key: str | None = None,
    ) -> None:
        self.max_model_len, self.delay_s, self.trusts, self.details = max_model_len, delay_s, trusts, details
        self.script, self.pieces, self.pause_s, self.key = script, answer, pause_s, key
        self.bodies: list[dict[str, Any]] = []
        self.seen, self.healthy, self.last = 0, True, []
        super().__init__()

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.post("/v1/chat/completions", self.chat),
        ]

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.max_model_len}, {"id": "lora"}]})

    def refuse(self, message: str, status: int = 400) -> web.Response:
        return web.json_response(
            {"error": {"message": message, "type": "BadRequestError", "code": status}}, status=status
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self.refuse("Unauthorized", 401)
        number, self.seen = self.seen, self.seen + 1
        body = await request.json()
        scripted = self.script(number)
        if isinstance(scripted, web.Response):
            return scripted
        if body.get("media_io_kwargs") and not self.trusts:
            return self.refuse("Per-request media_io_kwargs are disabled by default because they can change...")
        tokens = [token for message in body["messages"] for token in tokens_of(message)]
        if len(tokens) > self.max_model_len:
            return self.refuse(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(tokens)} input tokens"
            )
        self.bodies.append(body)
        await asyncio.sleep(self.delay_s)
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in ("", *self.pieces):
            await self.event(response, {"choices": [{"index": 0, "delta": {"content": piece}}]})
            await asyncio.sleep(self.pause_s if piece else 0)
            if piece and scripted == "break":
                request.transport.close()
                return response
        cached = next(
            (i for i, (a, b) in enumerate(zip(tokens, self.last)) if a != b), min(len(tokens), len(self.last))
        )
        self.last = tokens
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(self.pieces), "prompt_tokens_details": None}
        if self.details:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        await self.event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def event(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())


def videos_of(body: dict[str, Any]) -> list[str]:
    """URLs of the videos of a request, in order."""
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    return [part["video_url"]["url"] for part in parts if part["type"] == "video_url"]


def tokens_of(message: dict[str, Any]) -> list[Any]:
    tokens: list[Any] = [message["role"]]
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            tokens += list(part["text"])
        else:
            frames = part["video_url"]["url"].removeprefix("data:video/jpeg;base64,").split(",")
            tokens += [(hash(frame), i) for frame in frames for i in range(10)]
    return tokens
