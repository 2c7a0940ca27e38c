# SPDX-License-Identifier: Apache-2.0
"""Which questions of the quality lab the kept tokens answer at all: without a model, in minutes.

What is lost here no model can answer, so it bounds what the lab can find. ``python -m bench.quality.shown --out
bench/results/cpu/quality-shown`` asks about the lab's own clips; with ``--choose`` about others, to choose by.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import harness, tables
from bench.quality.ask import Variant, readable, unit_starts
from bench.quality.lab import unseen
from bench.quality.models import Settings
from bench.quality.report import KINDS
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.selection import make_plan
from evs_vllm.train.synthetic import Example, SceneSettings

CHOOSING = 15
"""Seed of the clips to choose by: neither those of training nor those that are reported."""
WAYS = ("evs", "focus", "paper", "contrast", "random_unit0", "random", "frames")
ORDER = TokenPixels(merge=2, channels=3, frames=2, side=14)
"""How Qwen2.5-VL's processor lays out a token of 28 x 28 pixels."""


def clip_of(example: Example, scene: SceneSettings) -> Clip:
    """A drawn clip as a server would see it, of cells of one token each."""
    grid = (len(example.frames) // 2, scene.rows, scene.columns)
    units, rows, columns = grid
    patches = example.frames.reshape(units, 2, rows, 2, 14, columns, 2, 14, 3)
    tokens = patches.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(units, rows * columns, ORDER.values)
    return Clip(torch.from_numpy(np.ascontiguousarray(tokens)), grid, ORDER, starts=unit_starts(example))


def measure(settings: Settings, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """For each way, rate, condition and kind of question: the share in % that the kept tokens answer, of how many."""
    per_unit = settings.scenes.rows * settings.scenes.columns
    found: dict[tuple[str, float, str, str], list[bool]] = {}
    for number, example in enumerate(examples):
        clip = clip_of(example, settings.scenes)
        kind = next(kind for kind, tasks in KINDS.items() if example.task in tasks)
        for way in WAYS:
            variant = Variant(way)
            for rate in settings.ask_rates:
                kept = make_plan(clip, variant.settings(rate, example), variant.chooses([], number)).kept
                key = (way, rate, example.condition, kind)
                found.setdefault(key, []).append(readable(example, kept, per_unit))
    return [
        {"selection": way, "rate": rate, "condition": condition, "kind": kind, "clips": len(shown)}
        | {"readable": 100 * statistics.mean(shown)}
        for (way, rate, condition, kind), shown in found.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """A row for each condition, kind of question and rate, a column for each way."""
    cells: dict[tuple[str, str, float], dict[str, float]] = {}
    for point in result["points"]:
        cells.setdefault((point["condition"], point["kind"], point["rate"]), {})[point["selection"]] = point["readable"]
    order = {condition: number for number, condition in enumerate(result["settings"]["scene"]["conditions"])}
    rows = [
        [condition, kind, f"{rate:g}", *(f"{values[way]:.1f}" for way in WAYS)]
        for (condition, kind, rate), values in sorted(
            cells.items(), key=lambda item: (order[item[0][0]], item[0][1] == "scene", item[0][2])
        )
    ]
    environment = result["environment"]
    head = ["condition", "asked about", "rate", *WAYS]
    note = f"\nQuestions in % that the kept tokens answer. {result['settings']['clips']} clips, seed {result['seed']}; "
    note += f"{result['seconds']} s; {environment['time_utc']}; `{environment['command']}`\n"
    return "\n".join([*tables.markdown(head, rows, "llr"), note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=harness.ROOT / "configs" / "quality" / "full.yaml")
    parser.add_argument("--clips", type=int, help="how many; by default those of the lab")
    parser.add_argument("--choose", action="store_true", help="other clips, to choose by")
    parser.add_argument("--out", type=Path, help="name of the result without suffix; printed only by default")
    args = parser.parse_args()
    settings = Settings.from_yaml(args.config)
    settings = replace(settings, clips=args.clips or settings.clips)
    seed = {"seed": CHOOSING} if args.choose else {}
    started = time.time()
    examples = unseen(settings, **seed)
    result = {
        "settings": {"scene": {**settings.scene, "conditions": settings.scenes.conditions}, "clips": settings.clips},
        "environment": harness.environment(),
        "seed": CHOOSING if args.choose else "of the lab",
        "points": measure(settings, examples),
    }
    result["seconds"] = round(time.time() - started)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
