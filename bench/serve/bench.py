# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmark: its servers, and how its rows are asked, in turns, and checked."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common.clips import QUESTION, ClipSpec, clip_file
from bench.serve import client, measurements
from bench.serve.measurements import Cell, Point, Repeat
from bench.serve.pool import STOCK_NOTE, Live, Pool, Server, request_options, server_of
from bench.serve.settings import Settings
from evs_vllm.errors import EVSError

WARM_UP = 1_000_000
"""Number of the clip that is asked for warm-up only."""

# A worker of vLLM polls its queue for one second after a request before it goes to sleep.
SETTLE_S = 1.2


class Bench:
    """One run: its settings, its servers, and how to ask them."""

    def __init__(self, settings: Settings, model: str, device: str, pool: Pool) -> None:
        self.settings, self.model, self.device, self.pool = settings, model, device, pool

    def clip(self, number: int, frames: int, moving: float | None = None) -> Path:
        size = self.settings.frame_size if moving is None else self.settings.drawn_size
        return clip_file(ClipSpec(number, frames, *size, moving))

    def body(self, row: str, turns: list[dict[str, Any]], rate: float, output_tokens: int | None = None) -> bytes:
        count = output_tokens or self.settings.output_tokens
        return client.body(self.model, turns, count, request_options(row, rate))

    def need(self, servers: dict[str, Server], rate: float) -> list[str]:
        """Makes sure that the servers of these rows are alive and warm; returns the rows whose servers are."""
        missing = [s.name for s in servers.values() if s.name not in self.pool.failed and s.name not in self.pool]
        if missing:
            say(f"servers   starting {', '.join(dict.fromkeys(missing))}")
        cold = {live.server.name for live in self.pool.need(list(servers.values()))}
        if (vanilla := servers["vanilla"].name) in self.pool.failed:
            raise EVSError(f"{self.pool.failed[vanilla]}: there is nothing to compare with")
        alive = [row for row, server in servers.items() if server.name not in self.pool.failed]
        turns = client.messages(self.clip(WARM_UP, 16), QUESTION)
        for row in alive:
            if servers[row].name in cold:
                client.run(self.pool[servers[row].name].url, [self.body(row, turns, rate)], 1)
        return alive

    def expected(self, row: str, vanilla_prompt: int, text: int, cell: Cell) -> int:
        """How many tokens a row's prompt must have, from vanilla's."""
        total = measurements.video_tokens(vanilla_prompt, text, cell.frames)
        if row in ("vanilla", "evs-off"):
            return text + total
        return text + measurements.kept_tokens(total, measurements.units(cell.frames), cell.rate, row == "stock")

    def measure(self, cell: Cell, rows: Sequence[str]) -> list[Point]:
        """All rows of a cell, in turns."""
        servers = {row: server_of(row, cell.rate, self.device) for row in rows}
        alive = self.need(servers, cell.rate)
        turns = [client.messages(self.clip(n, cell.frames, cell.moving), QUESTION) for n in range(cell.requests)]
        repeats: dict[str, list[Repeat]] = {row: [] for row in rows}
        for turn in range(self.settings.repeats):
            shift = turn % max(1, len(alive))
            for row in alive[shift:] + alive[:shift]:
                bodies = [self.body(row, messages, cell.rate) for messages in turns]
                repeats[row].append(_repeat(self.pool[servers[row].name], bodies, cell))
        text = client.text_tokens(self.model, turns[0])
        found = []
        for row in rows:
            point = Point(row, cell, note=STOCK_NOTE if row == "stock" and self.device == "cpu" else "")
            point.error = self.pool.failed.get(servers[row].name) or self._check(row, cell, repeats, text)
            point.repeats = [asdict(repeat) for repeat in repeats[row]]
            if point.error is None:
                measurements.summarize(point, repeats[row], repeats["vanilla"])
            found.append(point)
        return found

    def _check(self, row: str, cell: Cell, repeats: dict[str, list[Repeat]], text: int) -> str | None:
        first = [sample for repeat in repeats["vanilla"] for sample in repeat.samples]
        if not first or any(sample.error for sample in first):
            return f"vanilla vLLM did not answer: {first[0].error if first else 'no server'}"
        try:
            expected = self.expected(row, first[0].prompt_tokens, text, cell)
        except ValueError as error:
            return str(error)
        if error := measurements.failure(cell, repeats[row], expected, self.settings.output_tokens):
            return error
        if row == "evs-off" and cell.concurrency == 1:
            answers = [[sample.text for sample in repeats[name][0].samples] for name in ("vanilla", row)]
            return None if answers[0] == answers[1] else "with nothing dropped the answers differ from vanilla vLLM's"
        return None


def _repeat(live: Live, bodies: list[bytes], cell: Cell) -> Repeat:
    time.sleep(SETTLE_S)
    peaks = live.reset_peak_memory()
    before = live.planning()
    samples, wall = client.run(live.url, bodies, cell.concurrency)
    seconds, clips = (now - then for now, then in zip(live.planning(), before))
    return Repeat(samples, wall, seconds / clips if clips else None, live.peak_memory_mb() if peaks else None)


def say(text: str) -> None:
    print(text, flush=True)
