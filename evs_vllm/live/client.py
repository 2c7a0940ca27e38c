# SPDX-License-Identifier: Apache-2.0
"""Asks a vLLM server, waits for one that restarts, and explains why one refuses."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evs_vllm.errors import EVSError, ServerError
from evs_vllm.live.chat import Conversation
from evs_vllm.serving import Answer, chat, healthy, read_url

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 10.0
MOST_FAILURES = 3
"""How often a server that is healthy may fail at one request."""

BUSY = (429, 502, 503, 504)
"""What a server, or a router before it, answers that will take requests again later."""

MOST_FRAMES = 32
"""Frames of a chunk that a server takes unless it is told otherwise."""

_FULL = ("context length", "position id")
"""What a server says when a prompt is too long, in tokens or in positions."""


@dataclass(frozen=True)
class Asking:
    """How a server is asked.

    Attributes:
        url: Its base URL, without ``/v1``.
        model: The model's name there, or None for the first one that it lists.
        fps: Frames a second of the chunks.
        answer_tokens: Longest answer.
        keys: ``mm_processor_kwargs`` of each request.
        api_key: As the server's ``--api-key``.
        patience_s: How long the server may be gone, or say nothing.
    """

    url: str
    model: str | None
    fps: float
    answer_tokens: int
    keys: Mapping[str, Any]
    api_key: str | None = None
    patience_s: float = 300.0


class Client:
    """A connection to one server.

    Frames come as JPEGs, of which a server knows the times only if it is told how many a second there are. Requests
    may say so to a server with ``--trust-request-mm-kwargs``; to another one it is left out, and the user told.

    Attributes:
        model: The model's name there, once `connect` was called.
        max_model_len: Its context length in tokens, or None where the server does not say.
    """

    def __init__(
        self, asking: Asking, say: Callable[[str], None], wait: Callable[[float], object] = time.sleep
    ) -> None:
        self._asking, self._say, self._wait = asking, say, wait
        self._headers = {"Authorization": f"Bearer {asking.api_key}"} if asking.api_key else {}
        self._tells_fps = True
        self.model = asking.model or ""
        self.max_model_len: int | None = None

    def connect(self) -> None:
        """Asks the server what it serves.

        Raises:
            EVSError: It does not answer, or has no such model.
        """
        url = f"{self._asking.url}/v1/models"
        try:
            rows = json.loads(read_url(url, headers=self._headers))["data"]
            names = [str(row["id"]) for row in rows]
        except OSError as error:
            raise EVSError(f"no server answers at {url}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise EVSError(f"{url} does not list models as vLLM does: {error!r}") from None
        wanted = self._asking.model or next(iter(names), None)
        if wanted not in names:
            raise EVSError(f"the server has no model {wanted!r}; it has {', '.join(names) or 'none'}.")
        self.model, self.max_model_len = wanted, rows[names.index(wanted)].get("max_model_len")

    def body(self, conversation: Conversation) -> dict[str, Any]:
        """The request for the conversation as it is."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": conversation.messages(),
            "max_tokens": self._asking.answer_tokens,
            "temperature": 0,
        }
        if self._asking.keys:
            body["mm_processor_kwargs"] = dict(self._asking.keys)
        if self._tells_fps:
            body["media_io_kwargs"] = {"video": {"fps": self._asking.fps, "num_frames": -1}}
        return body

    def ask(self, conversation: Conversation, pieces: list[str] | None = None) -> Answer:
        """Asks about the conversation, again and again while the server is gone.

        Args:
            conversation: With at least one turn.
            pieces: Gets the pieces of the answer as they come; what an attempt that failed left there is removed.

        Raises:
            ServerError: The server refused it.
            EVSError: It stays away too long, or fails again and again.
        """
        failures, gone, delay = 0, None, FIRST_BACK_OFF_S
        pieces = [] if pieces is None else pieces
        while True:
            pieces.clear()
            try:
                answer = chat(
                    self._asking.url, self.body(conversation), self._asking.patience_s, self._headers, pieces.append
                )
            except ServerError as error:
                if self._drops_fps(error, conversation):
                    continue
                if error.status is not None and error.status < 500 and error.status != 429:
                    raise
                if error.status not in BUSY:
                    failures += healthy(self._asking.url)
                if failures >= MOST_FAILURES:
                    raise
                if gone is None:
                    gone = time.monotonic()
                    self._say(f"{error}; trying again")
                elif time.monotonic() - gone > self._asking.patience_s:
                    raise EVSError(
                        f"the server did not come back within {self._asking.patience_s:g} s: {error}"
                    ) from None
                self._wait(delay)
                delay = min(2 * delay, LONGEST_BACK_OFF_S)
            else:
                if gone is not None:
                    self._say(f"the server answers again after {time.monotonic() - gone:.1f} s")
                return answer

    def _drops_fps(self, error: ServerError, conversation: Conversation) -> bool:
        """Whether the server refused to be told the frames' times, and is to be asked without.

        Raises:
            EVSError: It would then take only some of the frames.
        """
        if not self._tells_fps or error.status != 400 or "media_io_kwargs" not in error.message:
            return False
        self._tells_fps = False
        fps, longest = self._asking.fps, max(chunk.frames for chunk in conversation.chunks)
        setting = json.dumps({"video": {"fps": fps, "num_frames": -1}})
        if longest > MOST_FRAMES:
            raise EVSError(
                f"a chunk has {longest} frames, of which this server may take {MOST_FRAMES}, as it takes no "
                f"media_io_kwargs from requests. Start it with --trust-request-mm-kwargs, or give a shorter --chunk."
            )
        self._say(
            "the server takes no media_io_kwargs from requests, so it believes that frames are as far apart as its own "
            f"setting says, by default 1 s. Start it with --trust-request-mm-kwargs or --media-io-kwargs '{setting}'."
        )
        return True


def why_refused(error: ServerError, conversation: Conversation, seconds: float, turns: int) -> EVSError:
    """The error that a user gets of a request that the server refused, with how long the session lasted.

    Args:
        error: The refusal.
        conversation: What was sent.
        seconds: The time in the stream at which the refused turn ends.
        turns: Turns that were answered before.
    """
    said = f"The server said, with HTTP {error.status}: {error.message}"
    if any(words in error.message.lower() for words in _FULL):
        chunks = conversation.chunks
        way_out = f"--keep-seconds below {conversation.seconds:g} drops the oldest chunks in time"
        if turns == 0:
            way_out = "a shorter --chunk or --every, or --max-side, makes a turn shorter"
        return EVSError(
            f"the session is full at {seconds:g} s, after {turns} turn(s): {conversation.seconds:g} s of video in "
            f"{len(chunks)} chunk(s) do not fit. To go on, {way_out}; a higher --rate, --positions sequential or the "
            f"server's --max-model-len make more fit. {said}"
        )
    if turns == 0 and ("mm_processor_kwargs" in error.message or "EVS is off" in error.message):
        return EVSError(
            "the server does not take the EVS keys of this command. Start it with evs-vllm installed and an --evs-* "
            f"option, or give --plain to ask it without. {said}"
        )
    return EVSError(f"the server refused the turn that ends at {seconds:g} s, after {turns} turn(s). {said}")
