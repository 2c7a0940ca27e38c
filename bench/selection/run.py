# SPDX-License-Identifier: Apache-2.0
"""Measures every selection on every clip under every condition, several clips at a time."""

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from bench.common import harness
from bench.common.fetch import sha256_of
from bench.common.pretrained_tower import pretrained_path, pretrained_tower, random_tower
from bench.common.workers import start_worker
from bench.selection.clips import Library, as_clip
from bench.selection.drift import drift_of
from bench.selection.features import Features
from bench.selection.measures import Judge, figures
from bench.selection.settings import Settings
from bench.selection.ways import AS_MANY, CAUSAL, WAYS, Scene, causal_budget, of_package
from evs_vllm.options import exact

SCHEMA = 1


@dataclass(frozen=True)
class Bench:
    """What a worker holds: everything that is needed to measure any clip of a run."""

    settings: Settings
    library: Library
    features: Features

    @classmethod
    def of(cls, settings: Settings) -> "Bench":
        """Reads the weights and finds the clips."""
        tower = pretrained_tower() if settings.tower == "pretrained" else random_tower(depth=2, width=64, seed=0)
        rows, columns = settings.grid
        return cls(settings, Library(settings), Features(tower, (rows, columns)))

    def scene(self, name: str, condition: str) -> Scene:
        """A clip under a condition, and what the tower makes of it."""
        frames = self.library.frames(name, condition)
        return Scene(f"{name} {condition}", frames, as_clip(frames), self.features.of(frames))

    def selections_on(self, name: str, condition: str) -> list[dict[str, Any]]:
        """One row per selection and rate."""
        scene, rows = self.scene(name, condition), []
        judge = Judge(scene.features)
        for rate in self.settings.rates:
            count = math.floor(scene.features[..., 0].numel() * (1 - exact(rate)))
            chosen = {way: of_package(scene, count, rate, way) for way in self.settings.selections or ()}
            chosen |= {way: choose(scene, count) for way, choose in WAYS.items()}
            for way, kept in chosen.items():
                if int(kept.sum()) != count:
                    raise RuntimeError(f"{way} keeps {int(kept.sum())} tokens of {scene.name}, not {count}.")
                row = {"clip": name, "condition": condition, "selection": way, "rate": rate, "kept": count}
                rows.append(row | figures(judge, kept))
            for way, kept in causal_budget(scene, rate).items():
                row = {"clip": name, "condition": condition, "selection": way, "rate": rate, "kept": int(kept.sum())}
                rows.append(row | {"tokens": kept.numel()} | figures(judge, kept))
        return rows

    def drift_on(self, name: str, condition: str) -> list[dict[str, Any]]:
        """One row per rate and way to compute less in the tower."""
        frames = self.library.frames(name, condition)
        rows = drift_of(self.features.tower, frames, self.settings.drift_rates, self.settings.drift)
        return [{"clip": name, "condition": condition} | row for row in rows]


_bench: Bench
"""Of a worker process, set when it starts."""


def _start(settings: Settings, threads: int) -> None:
    global _bench
    start_worker(threads)
    _bench = Bench.of(settings)


def _do(what: str, name: str, condition: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = getattr(_bench, what)(name, condition)
    return rows


def measure(settings: Settings, jobs: int, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures everything, `jobs` clips at a time in processes of their own; the content of the result file."""
    environment = harness.environment()
    started = time.time()
    # Fetched once, before workers look for it, and refused early.
    library = Library(settings)
    hashes = {name: sha256_of(path) for name, path in library.paths.items()}
    if settings.tower == "pretrained":
        hashes["tower"] = sha256_of(pretrained_path())
    cells = [(name, condition) for condition in settings.conditions for name in library.names]
    single = [("selections_on", *cell) for cell in cells if not library.is_cut(*cell)]
    # Their frames are those of the others, whose features are then there.
    cut = [("selections_on", *cell) for cell in cells if library.is_cut(*cell)]
    drift = [("drift_on", name, settings.conditions[0]) for name in library.names if settings.drift_rates]
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    # One thread each: a frame is too small for two.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (settings, threads)) as pool:
        for some in (single, cut + drift):
            running = {pool.submit(_do, *task): task for task in some}
            for number, future in enumerate(as_completed(running), 1):
                task = running[future]
                rows[task] = future.result()
                log(f"[{time.time() - started:5.0f} s] {number}/{len(some)} {task[0]} {task[1]}, {task[2]}")
    found = [row for cell in cells for row in rows["selections_on", *cell]]
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "environment": environment,
        "seconds": round(time.time() - started),
        "sha256": hashes,
        "rows": [row for row in found if row["selection"] not in (CAUSAL, AS_MANY)],
        # Of other numbers of tokens than the rate says, so they do not stand among the others.
        "causal": [row for row in found if row["selection"] in (CAUSAL, AS_MANY)],
        "drift": [row for task in drift for row in rows[task]],
    }
