# SPDX-License-Identifier: Apache-2.0
"""The run with instrumented servers: where the time to the first token goes."""

import json
import statistics
import time
from collections import defaultdict
from typing import Any

from bench.common import tables
from bench.common.clips import QUESTION
from bench.serve import client
from bench.serve.bench import Bench
from bench.serve.pool import Server, server_of

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


def stages(bench: Bench) -> list[dict[str, Any]]:
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
            turns = client.messages(bench.clip(number, frames), QUESTION)
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
    bench: Bench, row: str, server: Server, turns: list[dict[str, Any]], rate: float
) -> dict[str, float]:
    time.sleep(1.5)
    live, file = bench.pool[server.name], bench.pool.stages_file(server)
    file.write_text("")
    planned = live.planning()[0]
    (sample,), _ = client.run(live.url, [bench.body(row, turns, rate, output_tokens=1)], 1)
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
    rows = [
        [words, *(f"{entry['seconds'][name] * 1e3:.1f}" for entry in entries)]
        for name, words in {**STAGES, "ttft": "time to first token"}.items()
    ]
    head = ["stage", *(f"{entry['row']}, {entry['frames']} frames" for entry in entries)]
    title = "**Stages**, milliseconds, one request at a time, instrumented servers"
    return "\n".join(["", title, "", *tables.markdown(head, rows, "lr")])
