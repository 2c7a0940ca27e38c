# SPDX-License-Identifier: Apache-2.0
"""The steps of the benchmark, its result file and its report."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from bench.common import clips, harness
from bench.common.targets import table as targets_table
from bench.serve import caches, measurements, stages, targets
from bench.serve.bench import Bench, say
from bench.serve.pool import Pool, flags
from bench.serve.settings import Settings, as_json, local_model


def run(settings: Settings, name: str, model: str | None, device: str, out: Path, keep_logs: bool = False) -> int:
    """Measures everything that the settings ask for; the file is written after each step.

    Args:
        settings: What to measure.
        name: The name of their file.
        model: Folder or name of a model; None is the local one of the settings.
        device: "cpu" or "cuda".
        out: The result file; the table is written beside it.
        keep_logs: Keep the servers' logs also after a good run.

    Returns:
        0, or 1 where a row has no figures.
    """
    if device == "cuda":
        import torch  # noqa: F401  (so that the harness can name the GPU)
    model = model or str(local_model(settings.model))
    # The folder's name alone: where it lies is nobody's business.
    config = as_json(settings) | {"settings": name, "model_name": Path(model).name}
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

    env = settings.env | {"VLLM_NO_USAGE_STATS": "1"} | cpu_environment(device) | dict(os.environ)
    with Pool(model, flags(settings.serve), env, logs, settings.max_servers, device == "cpu") as pool:
        bench = Bench(settings, model, device, pool)
        steps(bench, done)
    content |= {"complete": True, "wall_s": time.monotonic() - started}
    content["bars"] = targets.bars(content)
    harness.write(content, out)
    table = report(content)
    out.with_suffix(".md").write_text(table + "\n")
    print("\n" + table)
    failed = [point for point in content["results"] if point["error"]]
    if failed or keep_logs:
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
            say("          " + measurements.brief(point))
        done("results", found)
    for key, step in (("caches", caches.caches), ("stages", stages.stages)):
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
        measurements.table(content["results"]),
        caches.cache_table(content["caches"]),
        stages.stage_table(content["stages"]),
        targets_table(content.get("bars", [])),
    ]
    return "\n".join(line for line in lines if line is not None)
