# SPDX-License-Identifier: Apache-2.0
"""What a stream of chunks loses beside one clip with as many tokens, as a pretrained tower sees it.

    python -m bench.stream.loss --clips report

cuts the clips of `bench.selection` into chunks and plans them as a stream, as a clip of each chunk, and as one clip
with as many tokens as the stream kept, by hindsight. It prints hold and coverage (`bench.selection.measures`) of each,
and which share of the tokens stays and is computed by a tower that reuses. No model answers anything here.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch

import evs_kernels
from bench.common.tables import markdown
from bench.selection.clips import as_clip
from bench.selection.measures import Judge
from bench.selection.run import Bench
from bench.selection.settings import Settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import LEARNED
from evs_vllm.core.selection import make_plan

CONDITIONS = ("as it is", "noise", "shake", "cuts")
RATES = (0.75, 0.9)
CHUNKS = (2, 4)
"""Units."""


def pieces(clip: Clip, units: int) -> Iterator[Clip]:
    """A clip in chunks; the last one may be shorter."""
    for start in range(0, clip.num_units, units):
        tokens = clip.tokens[start : start + units]
        yield replace(clip, tokens=tokens, grid=(len(tokens), *clip.grid[1:]))


def chunked(clip: Clip, units: int, config: EVSConfig) -> list[RetentionPlan]:
    """The plans of a clip's chunks: of a stream, if `config` says so."""
    plans, anchors = [], None
    for chunk in pieces(clip, units):
        chunk = chunk.after(anchors)
        plans.append(make_plan(chunk, config))
        if config.stream:
            anchors = LEARNED.anchors(torch.from_numpy(plans[-1].kept), chunk, config)
    return plans


def mask_of(plans: list[RetentionPlan]) -> torch.Tensor:
    """(T, P) bool, what stays of all chunks."""
    return torch.cat([torch.from_numpy(plan.mask).flatten(1) for plan in plans])


def by_hindsight(clip: Clip, count: int) -> torch.Tensor:
    """(T, P) bool, the tokens that a whole clip keeps if it may keep `count`."""
    kept = torch.zeros(clip.num_units, clip.tokens_per_unit, dtype=torch.bool)
    kept.view(-1)[evs_kernels.select_hold(LEARNED.descriptor.describe(clip), count).indices] = True
    return kept


def measured(bench: Bench, name: str, condition: str) -> Iterator[tuple[tuple[str, ...], list[float]]]:
    """Of a clip under a condition, by rate, chunk and way: hold, coverage, share kept, share computed, in percent."""
    frames = bench.library.frames(name, condition)
    clip, judge = as_clip(frames), Judge(bench.features.of(frames))
    tokens = clip.num_units * clip.tokens_per_unit
    for rate in RATES:
        for units in CHUNKS:
            config = EVSConfig(rate=rate, encoder="reuse")
            ways = {
                "chunks alone": chunked(clip, units, config),
                "stream": chunked(clip, units, replace(config, stream=True)),
            }
            masks = {way: mask_of(plans) for way, plans in ways.items()}
            computed = {way: sum(len(plan.computed) for plan in plans) for way, plans in ways.items()}
            masks["one clip, as many tokens"] = by_hindsight(clip, int(masks["stream"].sum()))
            for way, mask in masks.items():
                losses = [float(1 - cosine.mean()) for cosine in (judge.hold(mask), judge.coverage(mask))]
                shares = [int(mask.sum()) / tokens, computed.get(way, float("nan")) / tokens]
                yield (condition, f"{rate:g}", str(units), way), [100 * value for value in losses + shares]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clips", choices=("report", "choose"), default="report", help="which clips of bench.selection"
    )
    args = parser.parse_args()
    bench = Bench.of(Settings(clips=args.clips))
    found = defaultdict(list)
    for condition in CONDITIONS:
        for name in bench.library.single:
            for key, values in measured(bench, name, condition):
                found[key].append(values)
        print(f"{condition}: {len(bench.library.single)} clips", file=sys.stderr)
    rows = [[*key, *(f"{sum(v) / len(v):.1f}" for v in zip(*values, strict=True))] for key, values in found.items()]
    head = ("condition", "rate", "units", "way", "hold lost", "coverage lost", "kept %", "computed %")
    print("\n".join(markdown(head, rows, "lrrlr")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
