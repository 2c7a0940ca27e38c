# SPDX-License-Identifier: Apache-2.0
"""Two further runs on servers of their own: with caches on, and with instrumented servers that tell stage times."""

import json
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bench.common.clips import QUESTION
from bench.serve import client as load
from bench.serve import measurements as points
from bench.serve.measurements import Cell
from bench.serve.pool import Server, server_of

if TYPE_CHECKING:
    from bench.serve.__main__ import Bench

QUESTIONS = (QUESTION, "How many people ride their bikes down the street?")
TURNS = ("first question", "same clip, other question", "second turn")

STAGES = {
    "decode": "decode the video",
    "hf": "HF processor",
    "planning": "score, select, plan",
    "processor rest": "rest of vLLM's processor",
    "transport": "serialise and copy",
    "positions": "positions",
    "tower": "vision tower",
    "prefill": "language prefill",
    "other": "HTTP, JSON, scheduling, sampling",
}
"""In the order of a request. All but "planning" and "other" are timed in the process that does the work."""


def caches(bench: "Bench") -> list[dict[str, Any]]:
    """A new clip, then the same clip with another question, then a second turn of the first conversation."""
    options = bench.settings.caches
    cell = Cell(options.get("frames", 32), options.get("rate", 0.75))
    servers = {row: server_of(row, cell.rate, bench.device, cached=True) for row in options["rows"]}
    alive = bench.need(servers, cell.rate)
    found: dict[tuple[str, str], list[load.Sample]] = defaultdict(list)
    errors: dict[tuple[str, str], str] = {}
    for number in range(options.get("clips", 3)):
        first, second = (load.messages(bench.clip(number, cell.frames), question) for question in QUESTIONS)
        vanilla: dict[str, int] = {}
        for row in alive:  # vanilla first: its prompts tell what to expect
            url, answer = bench.pool[servers[row].name].url, ""
            for turn in TURNS:
                more = [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTIONS[1]}]
                turns = {TURNS[0]: first, TURNS[1]: second, TURNS[2]: first + more}[turn]
                time.sleep(0.2)
                (sample,), _ = load.run(url, [bench.body(row, turns, cell.rate)], 1)
                answer = answer or sample.text
                found[row, turn].append(sample)
                text = load.text_tokens(bench.model, turns)
                if row == "vanilla":
                    vanilla[turn] = sample.prompt_tokens - text
                expected = bench.expected(row, vanilla[turn] + text, text, cell) if not sample.error else 0
                if sample.error or sample.prompt_tokens != expected:
                    errors[row, turn] = sample.error or f"{sample.prompt_tokens} prompt tokens, expected {expected}"
    return [_cached(row, turn, samples, errors.get((row, turn)), found) for (row, turn), samples in found.items()]


def _cached(row: str, turn: str, samples: list[load.Sample], error: str | None, found: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"row": row, "turn": turn, "error": error, "samples": len(samples)}
    if error is None:
        times = [sample.ttft_s for sample in samples]
        base = statistics.median(sample.ttft_s for sample in found["vanilla", turn])
        entry |= {"ttft_p50_s": statistics.median(times), "ttft_spread_s": points.spread(times)}
        entry |= {"prompt_tokens": samples[0].prompt_tokens, "ttft_speedup": base / entry["ttft_p50_s"]}
    return entry


def cache_table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table of the run with caches on."""
    if not entries:
        return ""
    lines = ["", "**Caches on** (prefix cache and processor cache; one request at a time)", ""]
    lines += ["| row | turn | prompt tokens | TTFT p50 s | spread | speed-up |", "|---|---|---:|---:|---:|---:|"]
    for entry in entries:
        if entry["error"]:
            lines.append(f"| {entry['row']} | {entry['turn']} | no figure: {entry['error']} | | | |")
            continue
        low, high = entry["ttft_spread_s"]
        speedup = "1" if entry["row"] == "vanilla" else f"{entry['ttft_speedup']:.2f}x"
        figures = f"{entry['prompt_tokens']} | {entry['ttft_p50_s']:.2f} | {low:.2f}-{high:.2f} | {speedup}"
        lines.append(f"| {entry['row']} | {entry['turn']} | {figures} |")
    return "\n".join(lines)


def stages(bench: "Bench") -> list[dict[str, Any]]:
    """Where the time to the first token goes, one request at a time, on servers that write it down."""
    options = bench.settings.stages
    rate = options.get("rate", 0.75)
    servers = {row: server_of(row, rate, bench.device, stages=True) for row in options["rows"]}
    alive = bench.need(servers, rate)
    found = []
    for frames in options["frames"]:
        requests: dict[str, list[dict[str, float]]] = {row: [] for row in alive}
        # The first clip only warms up: memory for a new size is fetched from the system once.
        for number in range(options.get("repeats", 3) + 1):
            turns = load.messages(bench.clip(number, frames), QUESTIONS[0])
            for row in list(requests):
                try:
                    times = _stages_of_one(bench, row, servers[row], turns, rate)
                except RuntimeError as error:  # such a long clip, for example
                    print(f"          {row}, {frames} frames: no figure: {error}", flush=True)
                    del requests[row]
                    continue
                if number:
                    requests[row].append(times)
        for row, measured in requests.items():
            medians = {name: statistics.median(times[name] for times in measured) for name in measured[0]}
            found.append({"row": row, "frames": frames, "rate": rate, "requests": len(measured), "seconds": medians})
    return found


def _stages_of_one(
    bench: "Bench", row: str, server: Server, turns: list[dict[str, Any]], rate: float
) -> dict[str, float]:
    time.sleep(1.5)
    live, file = bench.pool[server.name], bench.pool.stages_file(server)
    file.write_text("")
    planned = live.planning()[0]
    (sample,), _ = load.run(live.url, [bench.body(row, turns, rate, output_tokens=1)], 1)
    if sample.error:
        raise RuntimeError(f"{server.name}: {sample.error}")
    raw: dict[str, float] = defaultdict(float)
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        raw[entry["stage"]] += entry["seconds"]
    planning, hf = live.planning()[0] - planned, raw["apply_hf_processor"]
    times = {
        "decode": raw["decode"], "hf": hf, "planning": planning,
        "processor rest": raw["processor"] - hf - planning, "transport": raw["transport"],
        "positions": raw["positions"], "tower": raw["tower"],
        "prefill": raw["step"] - raw["tower"] - raw["positions"],
    }  # fmt: skip
    return times | {"other": sample.ttft_s - sum(times.values()), "ttft": sample.ttft_s}


def stage_table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table of stage times."""
    if not entries:
        return ""
    lines = ["", "**Stages**, milliseconds, one request at a time, instrumented servers", ""]
    head = [f"{entry['row']}, {entry['frames']} frames" for entry in entries]
    lines += ["| stage | " + " | ".join(head) + " |", "|---" + "|---:" * len(entries) + "|"]
    for name, words in {**STAGES, "ttft": "time to first token"}.items():
        lines.append(f"| {words} | " + " | ".join(f"{entry['seconds'][name] * 1e3:.1f}" for entry in entries) + " |")
    return "\n".join(lines)
