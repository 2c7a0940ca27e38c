# SPDX-License-Identifier: Apache-2.0
"""How much a descriptor loses and how long it takes, for networks of several sizes, on the clips for choosing."""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import evs_kernels
from bench.common import harness
from bench.common.pretrained_tower import pretrained_tower
from bench.descriptor.train import Sample, fit, in_integers
from bench.selection.clips import Library, as_clip
from bench.selection.features import Features
from bench.selection.measures import Judge, figures
from bench.selection.settings import Settings
from evs_vllm.core.clip import Clip
from evs_vllm.core.descriptors import Contrast, low_resolution
from evs_vllm.core.learned import CELLS, Learned, Network, inputs_of

RATES = (0.75, 0.9)
CONDITIONS = ["as it is", "noise", "flicker", "slow light", "shake", "pan"]
SIZES: dict[str, tuple[int, list[int]]] = {
    "2 x 2 cells, 64-32": (2, [64, 32]),
    "2 x 2 cells, 128-64-32": (2, [128, 64, 32]),
    "4 x 4 cells, 32": (4, [32]),
    "4 x 4 cells, 64-32": (4, [64, 32]),
    "4 x 4 cells, 128-64-16": (4, [128, 64, 16]),
    "4 x 4 cells, 256-128-32": (4, [256, 128, 32]),
    "8 x 8 cells, 128-64-32": (8, [128, 64, 32]),
}
"""By name: cells along the side of a token, and the layers' widths."""

Describe = Callable[[Clip], torch.Tensor]


def compare(
    seen: list[tuple[Clip, torch.Tensor, float]],
    chosen: Network,
    steps: int,
    seed: int,
    folder: Path,
    log: Callable[[str], None] = print,
) -> None:
    """Trains every size, measures all on the clips for choosing, and writes compare.json and compare.md."""
    ways: dict[str, Describe] = {"contrast": Contrast().make, "learned (4 x 4 cells, 128-64-32)": _with(chosen, 4)}
    for name, (cells, widths) in SIZES.items():
        log(f"training {name}")
        samples = [Sample(inputs_of(low_resolution(clip, cells)), features, weight) for clip, features, weight in seen]
        ways[name] = _with(in_integers(fit(samples, widths, steps, seed, log), samples), cells)
    settings = Settings(clips="choose", selections=["paper"], conditions=CONDITIONS)
    library, features = Library(settings), Features(pretrained_tower(), (settings.grid[0], settings.grid[1]))
    scenes = [library.frames(name, condition) for condition in settings.conditions for name in library.names]
    found: dict[str, list[list[float]]] = {name: [] for name in ("paper", *ways)}
    for frames in scenes:
        clip, judge = as_clip(frames), Judge(features.of(frames))
        for name in found:
            kept = [_kept(clip, ways.get(name), rate) for rate in RATES]
            losses = [figures(judge, each) for each in kept]
            found[name].append([loss[measure] for measure in ("hold", "coverage") for loss in losses])
    largest = torch.randint(0, 256, (32, 256, 2352), dtype=torch.uint8)
    timed = Clip(largest, (32, 16, 16), as_clip(scenes[0]).pixels)
    rows = [
        {"name": name, "microseconds": _microseconds(ways[name], timed) if name in ways else None}
        | dict(
            zip(("hold .75", "hold .9", "coverage .75", "coverage .9"), np.mean(losses, axis=0).tolist(), strict=True)
        )
        for name, losses in found.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    levels = {condition: _levels(library, condition, chosen) for condition in settings.conditions}
    result = {"environment": harness.environment(), "steps": steps, "seed": seed, "scenes": len(scenes), "rows": rows}
    (folder / "compare.json").write_text(json.dumps(result | {"levels": levels}, indent=1) + "\n")
    (folder / "compare.md").write_text(_table(rows) + "\n" + _level_table(levels))
    log((folder / "compare.md").read_text())


def _levels(library: Library, condition: str, chosen: Network) -> dict[str, list[float]]:
    """By selection, in the unit of its threshold, how tokens differ from 4 units ago: median and 95th percentile."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("paper", "contrast", "learned")}
    for name in library.single:
        clip = as_clip(library.frames(name, condition))
        pixels = clip.tokens.to(torch.int16)
        found["paper"].append((pixels[4:] - pixels[:-4]).abs().float().mean(-1).flatten())
        for way, unit, described in (
            ("contrast", Contrast.unit, Contrast().make(clip)),
            ("learned", Learned.unit, _with(chosen, CELLS)(clip)),
        ):
            values = described.to(torch.int16)
            found[way].append((values[4:] - values[:-4]).abs().float().sum(-1).flatten() / unit)
    return {
        way: [float(np.quantile(torch.cat(values).numpy(), share)) for share in (0.5, 0.95)]
        for way, values in found.items()
    }


def _with(network: Network, cells: int) -> Describe:
    def describe(clip: Clip) -> torch.Tensor:
        rows = inputs_of(low_resolution(clip, cells))
        return network(rows.flatten(0, 1)).view(*rows.shape[:2], -1)

    return describe


def _kept(clip: Clip, describe: Describe | None, rate: float) -> torch.Tensor:
    """(T, P) bool, without a descriptor the paper's choice."""
    kept = torch.zeros(clip.num_units * clip.tokens_per_unit, dtype=torch.bool)
    count = math.floor(len(kept) * (1 - rate) + 1e-9)
    if describe is None:
        kept[evs_kernels.prune_topk(clip.tokens, count).indices] = True
    else:
        kept[evs_kernels.select_hold(describe(clip), count).indices] = True
    return kept.view(clip.num_units, -1)


def _microseconds(describe: Describe, clip: Clip) -> float:
    """Median time of a token, pooling included."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        describe(clip)
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times) / (clip.num_units * clip.tokens_per_unit)


def _level_table(levels: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| tokens against 4 units ago: median, 95 % | paper | contrast | learned |", "|---|---:|---:|---:|"]
    for condition, ways in levels.items():
        cells = (f"{middle:.1f}, {high:.1f}" for middle, high in ways.values())
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| descriptor | µs a token | hold .75 | hold .9 | coverage .75 | coverage .9 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        micro = "" if row["microseconds"] is None else f"{row['microseconds']:.2f}"
        losses = [f"{1000 * row[key]:.0f}" for key in ("hold .75", "hold .9", "coverage .75", "coverage .9")]
        lines.append(f"| {row['name']} | {micro} | {' | '.join(losses)} |")
    return "\n".join(lines) + "\n"
