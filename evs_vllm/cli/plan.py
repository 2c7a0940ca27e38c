# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm plan``: what would stay of a video, unit by unit, and what finding out costs. Starts no engine."""

import argparse
import json
import os
from typing import Any

from evs_vllm.cli._options import (
    add_clip_arguments,
    add_evs_options,
    check_paths,
    evs_config,
    media_io_kwargs,
    quiet_vllm,
    summary,
)
from evs_vllm.core.inspection import STAGES, Inspection
from evs_vllm.text import bar, percent, seconds, table

BAR_WIDTH = 32


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help="show which tokens of a video would stay", description=summary(__doc__))
    add_clip_arguments(parser)
    add_evs_options(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON, with the grid and the kept indices.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    clip = inspect(args)
    print(json.dumps(clip.to_mapping()) if args.json else "\n".join(lines(clip)))
    return 0


def inspect(args: argparse.Namespace) -> Inspection:
    """Runs the loader and the processor on what `add_clip_arguments` and `add_evs_options` parsed."""
    config = evs_config(args)
    check_paths(args.video, args.model)
    quiet_vllm()
    from evs_vllm.engine.inspect import inspect_clip

    model = os.path.expanduser(args.model)
    return inspect_clip(args.video, model, config, media_io_kwargs(args), args.trust_remote_code)


def lines(clip: Inspection) -> list[str]:
    """The report for a person."""
    plan, (count, height, width, _) = clip.plan, clip.frames.shape
    units, rows, columns = plan.grid
    per_unit = plan.tokens_per_unit
    when = clip.unit_seconds or (None,) * units
    body = [
        (str(unit), "" if at is None else f"{at:.2f}", str(per_unit), str(kept), bar(kept / per_unit, BAR_WIDTH))
        for unit, (at, kept) in enumerate(zip(when, plan.counts.tolist()))
    ]
    total = ("total", "", str(plan.num_tokens), str(plan.num_kept), f"{percent(clip.dropped_share)} dropped")
    before, after = clip.prompt_tokens
    return [
        f"{clip.video.name}: {count} frames of {width}x{height} as {clip.family} sees them, {units} units of "
        f"{rows}x{columns} = {per_unit} tokens",
        f"EVS drops {clip.config.describe()}".replace("drops nothing by default", "is off"),
        *_short_clip(clip),
        "",
        *table([("unit", "second", "before", "kept", ""), *body, total], right=(0, 1, 2, 3)),
        "",
        f"prompt  {before} -> {after} tokens for this clip",
        "time    " + ", ".join(f"{stage} {seconds(clip.seconds[stage])}" for stage in STAGES),
    ]


def _short_clip(clip: Inspection) -> list[str]:
    """A line that says why more is kept than the rate says, if so."""
    if not clip.is_short:
        return []
    kept = clip.plan.num_kept
    cap = f", cut to {kept} at most" if kept == clip.config.max_tokens else ""
    return [
        f"short clip: unit 0 whole and at least half of the share of the others{cap}: {kept} tokens, where "
        f"--video-pruning-rate would keep {clip.stock_kept}"
    ]
