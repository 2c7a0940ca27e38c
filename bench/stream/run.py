# SPDX-License-Identifier: Apache-2.0
"""Plays streams to servers, turn by turn, rows in turns, and checks what they count."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.common.clips import FPS, TOKEN
from bench.serve import client
from bench.serve.bench import SETTLE_S, say
from bench.serve.pool import CACHED, UNCACHED, Pool, Server
from bench.stream.scenes import chunk_files
from bench.stream.settings import Settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.errors import EVSError
from evs_vllm.serving import video_part

RESEND, VANILLA, ALONE = "vanilla, no caches", "vanilla", "evs per chunk"
BY_NAME = ", by name"
QUESTION = "What has changed?"
ANSWER = "Nothing of note."
"""What the assistant is said to have answered in every turn before: so all rows have the same text."""

_DETAILS = ("--enable-prompt-tokens-details",)
_EVS = ("--evs-rate", "0.75", "--evs-request-overrides", "any")
SERVERS = {
    "vanilla": Server("vanilla", (*UNCACHED, *_DETAILS), ()),
    "vanilla-cached": Server("vanilla-cached", (*CACHED, *_DETAILS), ()),
    "evs-cached": Server("evs-cached", (*CACHED, *_DETAILS, *_EVS), ("evs",)),
}


@dataclass(frozen=True)
class Row:
    """One way to serve a stream: its name, its server, what its requests say of EVS, and whether chunks that were sent
    before are only named."""

    name: str
    server: str
    options: Mapping[str, Any] = field(default_factory=dict)
    named: bool = False

    @property
    def streams(self) -> bool:
        return bool(self.options.get("evs_stream"))


def rows_of(settings: Settings) -> list[Row]:
    """All rows of a run."""
    streams = [Row(f"evs stream {q:g}", "evs-cached", {"evs_rate": q, "evs_stream": True}) for q in settings.rates]
    return [
        Row(RESEND, "vanilla"),
        Row(VANILLA, "vanilla-cached"),
        Row(ALONE, "evs-cached", {"evs_rate": settings.rates[0]}),
        *streams,
        Row(VANILLA + BY_NAME, "vanilla-cached", named=True),
        *(replace(row, name=row.name + BY_NAME, named=True) for row in streams[-1:]),
    ]


@dataclass
class Turn:
    """One answer: which turn of the stream, and what the client saw.

    Attributes:
        number: From 0.
        ttft_s: To the first text.
        prompt_tokens, cached_tokens: As the server counts them.
        video_tokens: Of the prompt.
        new_tokens: Video tokens of the chunk that is new in this turn; None where the turn before was not asked.
    """

    number: int
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    video_tokens: int
    new_tokens: int | None


@dataclass
class Played:
    """A row's answers to one stream."""

    scene: str
    frames: int
    row: str
    turns: list[Turn] = field(default_factory=list)
    error: str | None = None


def messages(chunks: list[Path], names: str = "") -> list[dict[str, Any]]:
    """The conversation whose last turn shows the last of these chunks.

    Args:
        chunks: All chunks so far.
        names: What the chunks' names begin with, where those before the last are to be named instead of sent.
    """
    turns: list[dict[str, Any]] = []
    for number, chunk in enumerate(chunks):
        if turns:
            turns.append({"role": "assistant", "content": ANSWER})
        sent = not names or number == len(chunks) - 1
        part = video_part(chunk) if sent else {"type": "video_url", "video_url": None}
        part |= {"uuid": f"{names}/{number}"} if names else {}
        turns.append({"role": "user", "content": [part, {"type": "text", "text": QUESTION}]})
    return turns


def play(settings: Settings, model: str, pool: Pool, scene: str, frames: int) -> list[Played]:
    """All rows of one stream: at every turn, all rows, in rotating order."""
    chunks = chunk_files(scene, settings.seconds, frames, settings.frame_size)
    rows = rows_of(settings)
    played = {row.name: Played(scene, frames, row.name) for row in rows}
    for row in rows:
        if row.server not in pool:
            played[row.name].error = pool.failed.get(row.server, "its server is not there")
    asked_last = ""
    for number in range(len(chunks)):
        conversation = messages(chunks[: number + 1])
        text = client.text_tokens(model, conversation)
        shift = number % len(rows)
        for row in rows[shift:] + rows[:shift]:
            mine = played[row.name]
            if mine.error or (row.name == RESEND and number % settings.resend_every):
                continue
            mine_sent = messages(chunks[: number + 1], f"{row.name} {scene} {frames}") if row.named else conversation
            body = client.body(model, mine_sent, settings.output_tokens, dict(row.options))
            # What another server was asked last still polls for a second, and takes a core from this one.
            time.sleep(0.2 if row.server == asked_last else SETTLE_S)
            asked_last = row.server
            (sample,), _ = client.run(pool[row.server].url, [body], 1)
            if sample.error:
                mine.error = f"turn {number}: {sample.error}"
                continue
            video = sample.prompt_tokens - text
            before = mine.turns[-1].video_tokens if mine.turns else 0
            new = video - before if len(mine.turns) == number else None
            mine.turns.append(Turn(number, sample.ttft_s, sample.prompt_tokens, sample.cached_tokens, video, new))
    for row in rows:
        mine = played[row.name]
        mine.error = mine.error or wrong_count(row, mine, settings.frame_size)
    return list(played.values())


def wrong_count(row: Row, played: Played, size: tuple[int, int]) -> str | None:
    """What is wrong with a row's numbers of tokens, or None.

    Without EVS a chunk has all of its tokens. With it, one that stands alone has as many as its rate says; one of a
    stream at most its share and a unit that was saved, at most what it has alone, and at least one; and all of them
    together at most the first one's number and the shares of the others.
    """
    units, per_unit = played.frames // 2, size[0] // TOKEN * (size[1] // TOKEN)
    if not row.options:
        wrong = [t.number for t in played.turns if t.video_tokens != (t.number + 1) * units * per_unit]
        return f"turn {wrong[0]} has another number of tokens than its frames" if wrong else None
    config = EVSConfig(rate=row.options["evs_rate"])
    alone, share = token_budget(units, per_unit, config), token_budget(units, per_unit, config, continues=True)
    for turn in played.turns:
        assert turn.new_tokens is not None  # these rows are asked at every turn
        first = turn.number == 0
        least = alone if first or not row.streams else 1
        most = alone if first or not row.streams else min(share + per_unit, alone)
        if not least <= turn.new_tokens <= most:
            return f"turn {turn.number} has {turn.new_tokens} new tokens, and {least} to {most} were expected"
        if row.streams and turn.video_tokens > alone + turn.number * share:
            return f"after turn {turn.number} the stream has {turn.video_tokens} tokens, more than its rate allows"
    return None


def warm_up(settings: Settings, model: str, pool: Pool) -> None:
    """Starts the servers and asks each a little; one chunk by itself, and the same again.

    Raises:
        EVSError: vanilla vLLM does not start, so there is nothing to compare with.
    """
    pool.need(list(SERVERS.values()))
    if VANILLA in pool.failed or "vanilla-cached" in pool.failed:
        raise EVSError("vanilla vLLM did not start: there is nothing to compare with")
    (chunk, *_) = chunk_files(settings.scenes[0], settings.seconds, settings.chunks[0], settings.frame_size)
    for name in SERVERS:
        if name in pool:
            question = {"role": "user", "content": [video_part(chunk), {"type": "text", "text": "Warm?"}]}
            client.run(pool[name].url, [client.body(model, [question], 2, {})] * 2, 1)
    time.sleep(SETTLE_S)


def play_all(settings: Settings, model: str, pool: Pool) -> list[dict[str, Any]]:
    """Every scene in chunks of every length."""
    warm_up(settings, model, pool)
    found = []
    for frames in settings.chunks:
        for scene in settings.scenes:
            say(f"stream    {scene}, chunks of {frames} frames ({frames / FPS:g} s)")
            for played in play(settings, model, pool, scene, frames):
                last = played.turns[-1] if played.turns else None
                says = played.error or (f"{last.prompt_tokens} tokens, TTFT {last.ttft_s:.2f} s" if last else "nothing")
                say(f"          {played.row:20} {says}")
                found.append(asdict(played))
    return found
