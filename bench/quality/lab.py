# SPDX-License-Identifier: Apache-2.0
"""The quality lab: trains and asks several models at a time. What the answers say is `bench.quality.report`."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import transformers

from bench.common import harness
from bench.common.workers import start_worker
from bench.quality.ask import Variant, ask
from bench.quality.models import Settings, claim, train_base, train_further
from evs_vllm.train.synthetic import Example, make_example

SCHEMA = 3
UNSEEN = 5
"""Seed of the clips that are asked about; those of training have others."""


def unseen(settings: Settings, seed: int = UNSEEN) -> list[Example]:
    """The questions; the conditions take turns."""
    scenes = [replace(settings.scenes, conditions=(condition,)) for condition in settings.scenes.conditions]
    return [make_example(scenes[number % len(scenes)], [seed, number]) for number in range(settings.clips)]


def prepare(folder: Path, settings: Settings, seed: int, name: str) -> Path:
    """One model's checkpoint, trained if it is not there. Its base has to be, for a model that has one."""
    if name == "base":
        return train_base(folder, settings, seed)
    return train_further(folder, settings, seed, name)


def points_of(folder: Path, settings: Settings, seed: int, name: str) -> list[dict[str, Any]]:
    """What one trained model answers, in every way and at every rate."""
    # At rate 0 nothing is dropped, and every way is the same.
    cells = [(Variant(), 0.0)]
    cells += [(Variant(*line), rate) for line, rates in settings.ways(name) for rate in rates]
    results = ask(prepare(folder, settings, seed, name), unseen(settings), cells)
    return [
        {"seed": seed, "model": name, **way._asdict(), "rate": rate, **result}
        for (way, rate), result in zip(cells, results, strict=True)
    ]


def through_engine(folder: Path, settings: Settings, seed: int, name: str) -> list[dict[str, Any]]:
    """What one trained model answers in a vLLM engine, at every rate, to the first of the questions."""
    from bench.quality.engine import ask_engine

    rates = [0.0, *settings.ask_rates]
    told = ask_engine(prepare(folder, settings, seed, name), unseen(settings)[: settings.engine_clips], rates)
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
        "questions": [[example.condition, example.task] for example in unseen(settings)],
        "points": [point for seed in settings.seeds for name in settings.models for point in points[seed, name]],
        "engine": sorted(engine, key=lambda point: settings.models.index(point["model"])),
    }
