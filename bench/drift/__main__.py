# SPDX-License-Identifier: Apache-2.0
"""How far K/V reuse drifts from the full vision tower, by depth, by staleness and by `encoder_refresh`.

Trains a small tower of Qwen2.5-VL's architecture here (self-supervised, on drawn clips and one real clip), then encodes
real clips with the full tower, with reuse at several rates and refresh intervals, and with plain skipping, and compares
the embeddings of the kept tokens. Nothing is downloaded. Example:
``python -m bench.drift --minutes 12 --out bench/results/cpu/drift.json``
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common import harness, tables
from bench.drift.small_tower import (
    Model,
    check,
    encode,
    explained,
    latest_of,
    load,
    patches,
    randomize,
    targets,
    to_rows,
    train,
)
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.selection import make_plan

# name: (tokens (rows, columns), every how many frames, was it trained on)
CLIPS = {
    "bikes": ((5, 12), (2, 6), False),
    "carphone_pristine": ((8, 10), (2, 3), False),
    "bigbuckbunny": ((6, 10), (2, 4), True),
}
STALENESS = (0, 0.5, 1, 2, 4, 8, 16)  # edges of the mean age of a unit's keys, in units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU time to train for (default: 12)")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--frames", type=int, default=32, help="frames of a measured clip, two per unit (default: 32)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--refresh", type=int, nargs="+", default=[0, 2, 4, 8, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="trained weights: read if the file exists, else written")
    parser.add_argument("--train-only", action="store_true", help="stop after training")
    parser.add_argument("--out", type=Path, help="result file. Default: bench/results/cpu/<date>-<commit>-drift.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = harness.environment()

    towers = {"random": Model(args.depth, args.width, args.seed)}
    randomize(towers["random"].visual, args.seed)
    check(towers["random"].visual, args.seed)
    trained = Model(args.depth, args.width, args.seed)
    if args.weights and args.weights.exists():
        saved = torch.load(args.weights)
        trained.load_state_dict(saved["model"])
        training = saved["training"]
    else:
        training = train(trained, args.minutes, args.seed)
        if args.weights:
            torch.save({"model": trained.state_dict(), "training": training}, args.weights)
    if args.train_only:
        return
    towers["trained"] = trained

    rows: list[dict[str, Any]] = []
    quality: dict[str, Any] = {}
    for name, (grid, steps, seen) in CLIPS.items():
        for step in steps:
            clip = load(name, args.frames, step, grid)
            quality[f"{name}/{step}"] = trained.explained(clip, grid)
            for tower, model in towers.items():
                # The random tower is the sideshow: one rate.
                rates = args.rates if tower == "trained" else [0.75]
                found = measure(model, clip, grid, rates, args.refresh)
                rows += [{"tower": tower, "clip": name, "step": step, "seen_in_training": seen} | row for row in found]
                print(f"measured {tower} {name} every {step} frames", flush=True)

    config = {k: v for k, v in vars(args).items() if k not in ("out", "weights", "train_only")}
    config |= {"clips": {k: list(v) for k, v in CLIPS.items()}, "staleness_edges": STALENESS}
    out = args.out or harness.default_path(harness.RESULTS, "cpu", "drift")
    content = harness.report("drift", config, [], environment)
    content |= {"training": training, "explained_variance": quality, "rows": rows}
    harness.write(content, out)
    table = markdown(content)
    out.with_suffix(".md").write_text(table)
    print(table)
    print(f"\nwritten to {out}")


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Model, clip: np.ndarray, grid: tuple[int, int], rates: list[float], refreshes: list[int]
) -> list[dict[str, Any]]:
    """One row per rate and way of computing, on the tokens kept after unit 0."""
    pixels = torch.from_numpy(clip)
    rows, (_, thumbnail) = to_rows(pixels), targets(pixels)
    units, places = len(rows), grid[0] * grid[1]
    full, full_states = encode(model.visual, rows, grid)
    tokens = patches(pixels).reshape(units, places, -1).contiguous()
    # Without what all tokens share (a cosine of embeddings is high by that alone).
    centre = full.mean((0, 1))
    found = []
    for rate in rates:
        ways = [f"reuse/{r}" for r in refreshes] + [f"interval/{r}" for r in refreshes if r] + ["skip", "previous"]
        for way in ways:
            refresh = int(way.split("/")[1]) if "/" in way else 0
            plan = make_plan(
                Clip(tokens, (units, *grid)), EVSConfig(rate=rate, encoder="reuse", encoder_refresh=refresh)
            )
            kept = torch.from_numpy(plan.mask).view(units, places)
            computed = torch.zeros(units * places, dtype=torch.bool)
            computed[torch.from_numpy(plan.computed)] = True
            computed = computed.view(units, places)
            if way.startswith("interval"):
                computed = every_unit(kept, int(computed.sum()))
            latest = latest_of(computed)
            age = (torch.arange(units)[:, None] - latest).float().mean(1)
            if way == "skip":
                got, states = encode(model.visual, rows, grid, visible=computed)
            elif way == "previous":  # the embedding that the full tower gave this place one unit earlier
                got, states = full.roll(1, 0), [s.roll(1, 0) for s in full_states]
            else:
                got, states = encode(model.visual, rows, grid, latest)
            judged = kept.clone()
            judged[0] = False
            cosine = F.cosine_similarity(got, full, dim=-1)
            centred = F.cosine_similarity(got - centre, full - centre, dim=-1)
            error = (got - full).norm(dim=-1) / full.norm(dim=-1)
            by_age = defaultdict(list)
            for t in range(1, units):
                edge = next(e for e in STALENESS if age[t] <= e)
                by_age[edge] += centred[t][judged[t]].tolist()
            layers = [
                float(F.cosine_similarity(a, b, dim=-1).view(units, places, 4).mean(-1)[judged].mean())
                for a, b in zip(states, full_states, strict=True)
            ]
            truth = thumbnail[:, None].expand(-1, places, -1)[judged]
            found.append(
                {
                    "rate": rate,
                    "way": way,
                    "tokens": int(judged.sum()),
                    "computed_share": float(computed.float().mean()),
                    "mean_age_units": float(age[1:].mean()),
                    "cosine": float(cosine[judged].mean()),
                    "cosine_p05": float(cosine[judged].quantile(0.05)),
                    "centred_cosine": float(centred[judged].mean()),
                    "centred_cosine_p05": float(centred[judged].quantile(0.05)),
                    "relative_error": float(error[judged].mean()),
                    "centred_cosine_by_age": {str(k): [statistics.fmean(v), len(v)] for k, v in by_age.items() if v},
                    "cosine_by_layer": layers,
                    "thumbnail": explained(model.unit(got)[judged], truth, 3),
                    "thumbnail_full": explained(model.unit(full)[judged], truth, 3),
                }
            )
    return found


def every_unit(kept: torch.Tensor, count: int) -> torch.Tensor:
    """The kept tokens and whole units at the smallest interval that computes at most `count` tokens: the plain way."""
    for interval in range(1, len(kept) + 1):
        computed = kept.clone()
        computed[::interval] = True
        if computed.sum() <= count:
            return computed
    return kept


def markdown(content: dict[str, Any]) -> str:
    """The tables of a result: means over the held-out clips and over all clips."""
    rows, lines = content["rows"], ["# Drift of K/V reuse from the full vision tower", ""]
    training = content["training"]
    lines += [
        f"Trained tower: {content['config']['depth']} layers, width {content['config']['width']}, "
        f"{training['parameters'] / 1e6:.1f}M parameters, {training['units_seen']} units in "
        f"{training['cpu_seconds']:.0f} CPU seconds. "
        "Share of variance explained on clips that it was not trained on (half of the tokens masked): "
        + ", ".join(
            f"{k} pixels {v['masked_pixels']:.2f}, thumbnail {v['unit_thumbnail']:.2f}"
            for k, v in content["explained_variance"].items()
            if not CLIPS[k.split("/")[0]][2]
        )
        + ".",
        "",
        "Mean over clips and frame steps; kept tokens after unit 0. `centred`: cosine without the mean embedding "
        "of the clip. `reuse/R`: encoder_refresh R. `interval/R`: no more tokens than reuse/R computes, but whole "
        "units at an interval. `skip`: dropped patches absent. `previous`: the full "
        "tower's embedding of the same place one unit earlier. `thumbnail`: share of the unit's picture, around its "
        "mean colour, that a head trained with the tower reads off one embedding.",
    ]
    for tower in ("trained", "random"):
        for held_out in (True, False):
            some = [r for r in rows if r["tower"] == tower and (not held_out or not r["seen_in_training"])]
            lines += ["", f"## {tower} tower, {'held-out clips' if held_out else 'all clips'}", ""]
            cells = []
            for rate, way in dict.fromkeys((r["rate"], r["way"]) for r in some):
                mine = [r for r in some if (r["rate"], r["way"]) == (rate, way)]

                def mean(key: str, mine: list[dict[str, Any]] = mine) -> float:
                    return statistics.fmean(r[key] for r in mine)

                cells.append([
                    f"{rate}", way, f"{mean('computed_share'):.2f}", f"{mean('mean_age_units'):.1f}",
                    *(f"{mean(key):.4f}" for key in ("cosine", "cosine_p05", "centred_cosine", "centred_cosine_p05")),
                    f"{mean('relative_error'):.3f}", f"{mean('thumbnail'):.3f} ({mean('thumbnail_full'):.3f})",
                ])  # fmt: skip
            head = ["rate", "way", "computed", "mean age", "cosine", "p05", "centred", "p05", "rel. error"]
            lines += tables.markdown([*head, "thumbnail (full)"], cells, "rlr")
        lines += ["", f"### {tower} tower, all clips: cosine after each layer (0: patch embedding)", ""]
        depth = content["config"]["depth"]
        some, cells = [r for r in rows if r["tower"] == tower], []
        for rate, way in dict.fromkeys((r["rate"], r["way"]) for r in some if r["way"] != "previous"):
            mine = [r["cosine_by_layer"] for r in some if (r["rate"], r["way"]) == (rate, way)]
            cells.append([f"{rate}", way, *(f"{statistics.fmean(x):.4f}" for x in zip(*mine))])
        lines += tables.markdown(["rate", "way", *map(str, range(depth + 1))], cells, "rlr")
        lines += ["", f"### {tower} tower, all clips, refresh 0: centred cosine by mean age of the unit's keys", ""]
        cells = []
        for rate in dict.fromkeys(r["rate"] for r in some):
            cells.append([f"{rate}"])
            for edge in STALENESS[1:]:
                pairs = [
                    r["centred_cosine_by_age"][str(edge)]
                    for r in some
                    if r["rate"] == rate and r["way"] == "reuse/0" and str(edge) in r["centred_cosine_by_age"]
                ]
                count = sum(n for _, n in pairs)
                cells[-1].append(f"{sum(v * n for v, n in pairs) / count:.4f} ({count})" if count else "")
        lines += tables.markdown(["rate", *(f"<= {edge}" for edge in STALENESS[1:])], cells, "r")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
