# SPDX-License-Identifier: Apache-2.0
"""The run with caches on, on servers of its own: a new clip, then the same clip again, in two ways."""

import statistics
import time
from collections import defaultdict
from typing import Any

from bench.common import tables
from bench.common.clips import QUESTION
from bench.serve import client
from bench.serve.bench import SETTLE_S, Bench
from bench.serve.measurements import Cell, spread
from bench.serve.pool import server_of

QUESTIONS = (QUESTION, "How many people ride their bikes down the street?")
TURNS = ("first question", "same clip, other question", "second turn")


def caches(bench: Bench) -> list[dict[str, Any]]:
    """A new clip, then the same clip with another question, then a second turn of the first conversation."""
    options = bench.settings.caches
    cell = Cell(options.get("frames", 32), options.get("rate", 0.75))
    servers = {row: server_of(row, cell.rate, bench.device, cached=True) for row in options["rows"]}
    alive = bench.need(servers, cell.rate)
    found: dict[tuple[str, str], list[client.Sample]] = defaultdict(list)
    errors: dict[tuple[str, str], str] = {}
    for number in range(options.get("clips", 3)):
        first, second = (client.messages(bench.clip(number, cell.frames), question) for question in QUESTIONS)
        vanilla: dict[str, int] = {}
        for row in alive:  # vanilla first: its prompts tell what to expect
            url, answer = bench.pool[servers[row].name].url, ""
            for turn in TURNS:
                more = [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTIONS[1]}]
                turns = {TURNS[0]: first, TURNS[1]: second, TURNS[2]: first + more}[turn]
                # What another server was asked last still polls for a second, and takes a core from this one.
                time.sleep(SETTLE_S if turn == TURNS[0] else 0.2)
                (sample,), _ = client.run(url, [bench.body(row, turns, cell.rate)], 1)
                answer = answer or sample.text
                found[row, turn].append(sample)
                text = client.text_tokens(bench.model, turns)
                if row == "vanilla":
                    vanilla[turn] = sample.prompt_tokens - text
                expected = bench.expected(row, vanilla[turn] + text, text, cell) if not sample.error else 0
                if sample.error or sample.prompt_tokens != expected:
                    errors[row, turn] = sample.error or f"{sample.prompt_tokens} prompt tokens, expected {expected}"
    return [_cached(row, turn, samples, errors.get((row, turn)), found) for (row, turn), samples in found.items()]


def _cached(row: str, turn: str, samples: list[client.Sample], error: str | None, found: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"row": row, "turn": turn, "error": error, "samples": len(samples)}
    if error is None:
        times = [sample.ttft_s for sample in samples]
        base = statistics.median(sample.ttft_s for sample in found["vanilla", turn])
        entry |= {"ttft_p50_s": statistics.median(times), "ttft_spread_s": spread(times)}
        entry |= {"prompt_tokens": samples[0].prompt_tokens, "ttft_speedup": base / entry["ttft_p50_s"]}
    return entry


def cache_table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table of the run with caches on."""
    if not entries:
        return ""
    rows = []
    for entry in entries:
        if entry["error"]:
            rows.append([entry["row"], entry["turn"], f"no figure: {entry['error']}"])
            continue
        low, high = entry["ttft_spread_s"]
        speedup = "1" if entry["row"] == "vanilla" else f"{entry['ttft_speedup']:.2f}x"
        figures = [f"{entry['prompt_tokens']}", f"{entry['ttft_p50_s']:.2f}", f"{low:.2f}-{high:.2f}", speedup]
        rows.append([entry["row"], entry["turn"], *figures])
    head = ("row", "turn", "prompt tokens", "TTFT p50 s", "spread", "speed-up")
    title = "**Caches on** (prefix cache and processor cache; one request at a time)"
    return "\n".join(["", title, "", *tables.markdown(head, rows, "llr")])
