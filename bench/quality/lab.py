# SPDX-License-Identifier: Apache-2.0
"""The quality lab: trains and asks several models at a time, and reads bars, tables and pictures off the answers."""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from bench.common import harness, tables
from bench.common.targets import add_bar, table
from bench.common.workers import start_worker
from bench.quality.ask import Variant, ask
from bench.quality.models import Settings, claim, train_base, train_further
from evs_vllm.train.synthetic import Example, make_example

SCHEMA = 2
UNSEEN = 5
"""Seed of the clips that are asked about; those of training have others."""

# ---------------------------------------------------------------- training and asking, several at a time


def unseen(settings: Settings) -> list[Example]:
    """The questions."""
    return [make_example(settings.scenes, [UNSEEN, number]) for number in range(settings.clips)]


def prepare(folder: Path, settings: Settings, seed: int, name: str) -> Path:
    """One model's checkpoint, trained if it is not there. Its base has to be, for a model that has one."""
    if name == "base":
        return train_base(folder, settings, seed)
    return train_further(folder, settings, seed, name)


def points_of(folder: Path, settings: Settings, seed: int, name: str) -> list[dict[str, Any]]:
    """What one trained model answers, in every way and at every rate."""
    ways = [Variant(), *(Variant(*line) for line in settings.compare if name != "control")]
    # At rate 0 nothing is dropped, and every way is the same.
    cells = [(way, rate) for way in ways for rate in [0.0, *settings.ask_rates] if rate or way == Variant()]
    results = ask(prepare(folder, settings, seed, name), unseen(settings), cells)
    return [
        {"seed": seed, "model": name, **way._asdict(), "rate": rate, **result}
        for (way, rate), result in zip(cells, results, strict=True)
    ]


def through_engine(folder: Path, settings: Settings, seed: int, name: str) -> list[dict[str, Any]]:
    """What one trained model answers in a vLLM engine, at every rate."""
    from bench.quality.engine import ask_engine

    rates = [0.0, *settings.ask_rates]
    told = ask_engine(prepare(folder, settings, seed, name), unseen(settings), rates)
    return [{"seed": seed, "model": name, "rate": rate, **point} for rate, point in zip(rates, told, strict=True)]


def be_quiet() -> None:
    """Lets transformers show errors only."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _start(threads: int) -> None:
    start_worker(threads)
    be_quiet()


def measure(settings: Settings, folder: Path, jobs: int = 1, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and asks, up to `jobs` models at a time in processes of their own; the content of the JSON file."""
    claim(folder, settings)
    started = time.time()
    points: dict[tuple[int, str], list[dict[str, Any]]] = {}
    engine: list[dict[str, Any]] = []
    # Small models wait for threads more than they compute: better several at a time with a thread each.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (threads,)) as pool:
        running: dict[Future[Any], tuple[Callable[..., Any], int, str]] = {}

        def start(do: Callable[..., Any], seed: int, name: str) -> None:
            running[pool.submit(do, folder, settings, seed, name)] = (do, seed, name)

        for seed in settings.seeds:
            start(prepare, seed, "base")
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                do, seed, name = running.pop(future)
                result = future.result()
                log(f"[{time.time() - started:5.0f} s] {do.__name__} {name} of seed {seed}")
                if do is prepare:
                    for other in settings.models[1:] if name == "base" else ():
                        start(prepare, seed, other)
                    start(points_of, seed, name)
                elif do is points_of:
                    points[seed, name] = result
                    if seed == settings.seeds[0] and name in settings.engine:
                        start(through_engine, seed, name)
                else:
                    engine += result
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "environment": harness.environment(),
        "seconds": round(time.time() - started),
        "points": [point for seed in settings.seeds for name in settings.models for point in points[seed, name]],
        "engine": sorted(engine, key=lambda point: settings.models.index(point["model"])),
    }


# ---------------------------------------------------------------- bars


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's bars, for what the result has figures of; see bench/serve/targets.py for the form."""
    lines = lines_of(result)
    found: list[dict[str, Any]] = []
    plain = ("evs", "keep", "full")
    add = partial(add_bar, found, unit=" points")

    def mean(model: str, way: Sequence[str], rate: float) -> float | None:
        values = [point["accuracy"] for point in lines.get((model, *way), {}).get(rate, ())]
        return statistics.mean(values) if values else None

    dense = mean("base", plain, 0.0)
    add("base, nothing dropped", dense, 95, unit=" %")
    pruned = mean("base", plain, 0.75)
    if dense is not None and pruned is not None:
        add("plug-in EVS below dense, q=0.75", dense - pruned, 1.5, at_most=True)
    if gains := gains_of(result, 0.9):
        add(f"uptrained above control, q=0.9 (95 % interval ± {interval(gains):.1f})", statistics.mean(gains), 2)
    evs, random = mean("base", plain, 0.9), mean("base", ("random_unit0", "keep", "full"), 0.9)
    if evs is not None and random is not None:
        add("EVS above random tokens with unit 0, q=0.9", evs - random, 15)
    for model in ("base", "uptrained"):
        losses = {
            rate: (mean(model, plain, rate) or 0) - (mean(model, ("evs", "keep", "reuse"), rate) or 0)
            for rate in lines.get((model, "evs", "keep", "reuse"), {})
        }
        if losses:
            worst = max(losses, key=lambda rate: losses[rate])
            add(f"{model}: reuse below the full tower, worst rate (q={worst:g})", losses[worst], 0.5, at_most=True)
    for name in {point["model"]: None for point in result["engine"]}:
        shares = {point["rate"]: agreement(result, point) for point in result["engine"] if point["model"] == name}
        worst = min(shares, key=lambda rate: shares[rate])
        add(f"{name}: vLLM and transformers agree, worst rate (q={worst:g})", shares[worst], 99.5, unit=" %")
    return found


def gains_of(result: dict[str, Any], rate: float) -> list[float]:
    """Uptrained minus control in points, seed by seed: the same steps on the same clips, but for the rates."""
    lines = lines_of(result)
    one, other = (lines.get((name, "evs", "keep", "full"), {}).get(rate, []) for name in ("uptrained", "control"))
    by_seed = {point["seed"]: point["accuracy"] for point in other}
    return [point["accuracy"] - by_seed[point["seed"]] for point in one if point["seed"] in by_seed]


def agreement(result: dict[str, Any], asked: dict[str, Any]) -> float:
    """In %, how many of the questions vLLM and transformers answer both right or both wrong."""
    (same,) = (
        point["right"]
        for point in lines_of(result)[asked["model"], "evs", "keep", "full"][asked["rate"]]
        if point["seed"] == asked["seed"]
    )
    return 100 * statistics.mean(a == b for a, b in zip(same, asked["right"], strict=True))


# ---------------------------------------------------------------- tables and pictures


def lines_of(result: dict[str, Any]) -> dict[tuple[str, ...], dict[float, list[dict[str, Any]]]]:
    """Points by line of the table and rate, one per seed."""
    lines: dict[tuple[str, ...], dict[float, list[dict[str, Any]]]] = {}
    for point in result["points"]:
        key = (point["model"], point["selection"], point["positions"], point["tower"])
        lines.setdefault(key, {}).setdefault(point["rate"], []).append(point)
    return lines


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; 0 for one value."""
    if len(values) < 2:
        return 0.0
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def markdown(result: dict[str, Any]) -> str:
    """The table: mean accuracy in % over the seeds, with its 95 % interval where there are several."""
    rates = sorted({point["rate"] for point in result["points"]})
    rows = []
    for key, cells in lines_of(result).items():
        texts = []
        for rate in rates:
            values = [point["accuracy"] for point in cells.get(rate, [])]
            spread = f" ± {interval(values):.1f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        rows.append([*key, *texts])
        if key == ("base", "evs", "keep", "full"):
            shown = [f"{statistics.mean(p['readable'] for p in cells[rate]):.1f}" for rate in rates]
            rows.append(["*answer still readable*", "evs", "", "", *shown])
    settings, environment = result["settings"], result["environment"]
    units, seeds = settings["curriculum"][-1][0], len(settings["seeds"])
    head = ["model", "tokens", "positions", "tower", *(f"q={rate:g}" for rate in rates)]
    note = (
        f"\n{settings['clips']} unseen clips of {units} units, {seeds} seed(s); "
        f"{result['seconds']} s; {environment['time_utc']}; `{environment['command']}`"
    )
    return "\n".join([*tables.markdown(head, rows, "llllr"), note, table(bars(result))]) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against the rate: the base with each way to choose tokens, and EVS with the other models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {key: cells for key, cells in lines_of(result).items() if key[2:] == ("keep", "full")}
    dense = shown["base", "evs", "keep", "full"].get(0.0, [])
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for (model, selection, *_), cells in shown.items():
        if model != "base" and selection != "evs":
            continue
        cells = {0.0: dense} | cells
        rates = sorted(rate for rate, points in cells.items() if points)
        means = [statistics.mean(point["accuracy"] for point in cells[rate]) for rate in rates]
        axes.plot(rates, means, "o-" if model == "base" else "s--", label=f"{model}, {selection}")
    axes.set(xlabel="share of video tokens dropped", ylabel="right answers, %", ylim=(0, 100))
    axes.grid(color="#DDDDDD")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
