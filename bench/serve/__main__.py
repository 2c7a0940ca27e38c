# SPDX-License-Identifier: Apache-2.0
"""End to end: real ``vllm serve`` processes with vanilla vLLM, vLLM's own pruning and this plugin, side by side.

Rows take turns in every repeat, all get the same clips, and a row whose answers fail a check gets no figures.

    python -m bench.serve configs/bench/ten_minutes.yaml

writes a JSON file and a Markdown table; ``bench/serve/plot.py`` draws it, ``bench/serve/compare.py`` compares
two of them.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from bench.common import clips, harness
from bench.common.clips import QUESTION, ClipSpec, clip_file
from bench.common.targets import table as target_table
from bench.serve import client as load
from bench.serve import measurements as points
from bench.serve import stages as extras
from bench.serve import targets as bars
from bench.serve.measurements import Cell, Point, Repeat
from bench.serve.pool import STOCK_NOTE, Live, Pool, Server, flags, request_options, server_of
from bench.serve.settings import Settings, as_json, load_settings, local_model
from evs_vllm.cli._servers import stoppable
from evs_vllm.errors import EVSError

WARM_UP = 1_000_000
"""Number of the clip that is asked for warm-up only."""

# A worker of vLLM polls its queue for one second after a request before it goes to sleep.
SETTLE_S = 1.5


class Bench:
    """One run: its settings, its servers, and how to ask them."""

    def __init__(self, settings: Settings, model: str, device: str, pool: Pool) -> None:
        self.settings, self.model, self.device, self.pool = settings, model, device, pool

    def clip(self, number: int, frames: int, moving: float | None = None) -> Path:
        size = self.settings.frame_size if moving is None else self.settings.drawn_size
        return clip_file(ClipSpec(number, frames, *size, moving))

    def body(self, row: str, turns: list[dict[str, Any]], rate: float, output_tokens: int | None = None) -> bytes:
        count = output_tokens or self.settings.output_tokens
        return load.body(self.model, turns, count, request_options(row, rate))

    def need(self, servers: dict[str, Server], rate: float) -> list[str]:
        """Makes sure that the servers of these rows are alive and warm; returns the rows whose servers are."""
        missing = [s.name for s in servers.values() if s.name not in self.pool.failed and s.name not in self.pool]
        if missing:
            say(f"servers   starting {', '.join(dict.fromkeys(missing))}")
        cold = {live.server.name for live in self.pool.need(list(servers.values()))}
        if (vanilla := servers["vanilla"].name) in self.pool.failed:
            raise EVSError(f"{self.pool.failed[vanilla]}: there is nothing to compare with")
        alive = [row for row, server in servers.items() if server.name not in self.pool.failed]
        turns = load.messages(self.clip(WARM_UP, 16), QUESTION)
        for row in alive:
            if servers[row].name in cold:
                load.run(self.pool[servers[row].name].url, [self.body(row, turns, rate)], 1)
        return alive

    def expected(self, row: str, vanilla_prompt: int, text: int, cell: Cell) -> int:
        """How many tokens a row's prompt must have, from vanilla's."""
        total = points.video_tokens(vanilla_prompt, text, cell.frames)
        pruned = row not in ("vanilla", "evs-off")
        return text + (points.kept_tokens(total, points.units(cell.frames), cell.rate) if pruned else total)

    def measure(self, cell: Cell, rows: Sequence[str]) -> list[Point]:
        """All rows of a cell, in turns."""
        servers = {row: server_of(row, cell.rate, self.device) for row in rows}
        alive = self.need(servers, cell.rate)
        turns = [load.messages(self.clip(n, cell.frames, cell.moving), QUESTION) for n in range(cell.requests)]
        repeats: dict[str, list[Repeat]] = {row: [] for row in rows}
        for turn in range(self.settings.repeats):
            shift = turn % max(1, len(alive))
            for row in alive[shift:] + alive[:shift]:
                bodies = [self.body(row, messages, cell.rate) for messages in turns]
                repeats[row].append(_repeat(self.pool[servers[row].name], bodies, cell))
        text = load.text_tokens(self.model, turns[0])
        found = []
        for row in rows:
            point = Point(row, cell, note=STOCK_NOTE if row == "stock" and self.device == "cpu" else "")
            point.error = self.pool.failed.get(servers[row].name) or self._check(row, cell, repeats, text)
            point.repeats = [asdict(repeat) for repeat in repeats[row]]
            if point.error is None:
                points.summarize(point, repeats[row], repeats["vanilla"])
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
        if error := points.failure(cell, repeats[row], expected, self.settings.output_tokens):
            return error
        if row == "evs-off" and cell.concurrency == 1:
            answers = [[sample.text for sample in repeats[name][0].samples] for name in ("vanilla", row)]
            return None if answers[0] == answers[1] else "with nothing dropped the answers differ from vanilla vLLM's"
        return None


def _repeat(live: Live, bodies: list[bytes], cell: Cell) -> Repeat:
    time.sleep(SETTLE_S)
    peaks = live.reset_peak_memory()
    before = live.planning()
    samples, wall = load.run(live.url, bodies, cell.concurrency)
    seconds, clips = (now - then for now, then in zip(live.planning(), before))
    return Repeat(samples, wall, seconds / clips if clips else None, live.peak_memory_mb() if peaks else None)


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a file of configs/bench")
    parser.add_argument("--model", help="folder or name of a real model; by default a small local one is made")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the servers run")
    parser.add_argument("--out", type=Path, help="result file; by default one in bench/results")
    parser.add_argument("--keep-logs", action="store_true", help="keep the servers' logs also after a good run")
    args = parser.parse_args()
    settings = load_settings(args.settings)
    kind = f"serve-{args.settings.stem}"
    out = args.out or harness.default_path(harness.RESULTS, args.device, kind)
    try:
        with stoppable():
            return run(settings, args, out)
    except EVSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(settings: Settings, args: argparse.Namespace, out: Path) -> int:
    """Measures everything that the settings ask for; the file is written after each step."""
    if args.device == "cuda":
        import torch  # noqa: F401  (so that the harness can name the GPU)
    model = args.model or str(local_model(settings.model))
    # The folder's name alone: where it lies is nobody's business.
    config = as_json(settings) | {"settings": args.settings.name, "model_name": Path(model).name}
    config["clips"] = {"version": clips.VERSION, "opencv": cv2.__version__}
    content = harness.report("serve", config, [], harness.environment())
    content |= {"caches": [], "stages": [], "complete": False}
    started = time.monotonic()
    content["load_average"] = [os.getloadavg()]
    if content["load_average"][0][0] > 0.5 * content["environment"]["cpus"]:
        say(f"warning   the machine is busy: load average {os.getloadavg()[0]:.1f}")
    logs = Path(tempfile.mkdtemp(prefix="evs-bench-"))
    say(f"model     {Path(model).name}\nlogs      {logs}\nresult    {out}")

    def done(key: str, found: Sequence[Any]) -> None:
        content[key] += [item if isinstance(item, dict) else asdict(item) for item in found]
        content["load_average"].append(os.getloadavg())
        harness.write(content, out)

    env = settings.env | {"VLLM_NO_USAGE_STATS": "1"} | cpu_environment(args.device) | dict(os.environ)
    with Pool(model, flags(settings.serve), env, logs, settings.max_servers, args.device == "cpu") as pool:
        bench = Bench(settings, model, args.device, pool)
        steps(bench, done)
    content |= {"complete": True, "wall_s": time.monotonic() - started}
    content["bars"] = bars.bars(content)
    harness.write(content, out)
    table = report(content)
    out.with_suffix(".md").write_text(table + "\n")
    print("\n" + table)
    failed = [point for point in content["results"] if point["error"]]
    if failed or args.keep_logs:
        say(f"\nlogs      {logs}")
    else:
        shutil.rmtree(logs)
    return 1 if failed else 0


def steps(bench: Bench, done: Callable[[str, Sequence[Any]], None]) -> None:
    """The cells, the run with caches on and the run with instrumented servers."""
    for cell, entry in bench.settings.cells().items():
        say(f"cell      {cell.label}")
        found = bench.measure(cell, entry["rows"])
        for point in found:
            point.sweeps = entry["sweeps"]
            say("          " + points.brief(point))
        done("results", found)
    for key, step in (("caches", extras.caches), ("stages", extras.stages)):
        if getattr(bench.settings, key):
            bench.pool.stop()
            say(key)
            done(key, step(bench))


def cpu_environment(device: str) -> dict[str, str]:
    """What vLLM's CPU engine needs to know; the caller's own environment wins."""
    if device != "cpu":
        return {}
    # By default vLLM leaves one core to the API server. With 2 cores that halves the engine, in all rows alike.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def report(content: dict[str, Any]) -> str:
    """Everything as Markdown."""
    environment, loads = content["environment"], content["load_average"]
    lines = [
        f"`{environment['command']}`, commit {(environment['commit'] or '?')[:10]}, {environment['time_utc']}",
        f"\n{environment['cpus']} x {environment['cpu']}, GPU: {environment['gpu'] or 'none'}; load average "
        f"{loads[0][0]:.1f} before, {max(load[0] for load in loads):.1f} at most; {content['wall_s'] / 60:.0f} minutes",
        "",
        points.table(content["results"]),
        extras.cache_table(content["caches"]),
        extras.stage_table(content["stages"]),
        target_table(content.get("bars", [])),
    ]
    return "\n".join(line for line in lines if line is not None)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
