# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers, in miniature: trains small models here and asks them about drawn clips.

Per seed three models of Qwen2.5-VL's architecture: the base (rate 0, clips of growing length), and from it the control
(more steps at rate 0) and the uptrained one (as many steps at random rates), all by `evs_vllm.train`. Each answers the
same unseen clips at each rate, with tokens chosen by EVS and by simpler ways, with both kinds of positions, and with
the vision tower computing everything, reusing keys and values, or skipping patches without reuse. Nothing is
downloaded: ``python bench/quality.py --out bench/results/cpu/quality`` writes quality.json, .md and .svg; ``--config``
takes another file of configs/quality.

Miniature and synthetic: it says whether the method and this code work, not what a big model loses.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from quality_models import Settings, claim, speed_up, trained_models  # noqa: E402
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention  # noqa: E402

import evs_vllm.hf.model  # noqa: E402
import evs_vllm.hf.tower  # noqa: E402
from evs_vllm import hf  # noqa: E402
from evs_vllm.plan import RetentionPlan  # noqa: E402
from evs_vllm.reuse import ReuseSchedule  # noqa: E402
from evs_vllm.select import make_plan, token_budget  # noqa: E402
from evs_vllm.train.data import ChatCollator, as_item  # noqa: E402
from evs_vllm.train.synthetic import Example, make_example  # noqa: E402
from evs_vllm.train.trainer import answers  # noqa: E402

SCHEMA = 1

# ---------------------------------------------------------------- other ways to choose, and to compute


def choose_random(keep_first: bool, generator: np.random.Generator) -> Callable[..., RetentionPlan]:
    """As many tokens as EVS keeps, at random; with `keep_first` unit 0 stays whole."""

    def choose(tokens: torch.Tensor, grid: tuple[int, int, int], config: Any) -> RetentionPlan:
        units, per_unit, _ = tokens.shape
        budget = token_budget(units, per_unit, config)
        first = per_unit if keep_first else 0
        others = first + generator.permutation(units * per_unit - first)[: budget - first]
        return RetentionPlan(grid, np.sort(np.concatenate([np.arange(first), others])), config.positions)

    return choose


def choose_frames(tokens: torch.Tensor, grid: tuple[int, int, int], config: Any) -> RetentionPlan:
    """As many whole units, evenly spread, as fit the number of tokens that EVS keeps."""
    units, per_unit, _ = tokens.shape
    count = max(1, token_budget(units, per_unit, config) // per_unit)
    wanted = np.unique(np.linspace(0, units - 1, count).round().astype(np.int64))
    kept = (wanted[:, None] * per_unit + np.arange(per_unit)).reshape(-1)
    return RetentionPlan(grid, kept, config.positions)


def choose_cosine(embeddings: Iterator[torch.Tensor]) -> Callable[..., RetentionPlan]:
    """The paper's other score: one minus the cosine of a token's embedding to that of its place one unit earlier."""

    def choose(tokens: torch.Tensor, grid: tuple[int, int, int], config: Any) -> RetentionPlan:
        units, per_unit, _ = tokens.shape
        rows = next(embeddings).view(units, per_unit, -1)
        score = 1 - cosine_similarity(rows[1:], rows[:-1], dim=-1)
        best = np.argsort(-score.flatten().numpy(), kind="stable")
        kept = per_unit + best[: token_budget(units, per_unit, config) - per_unit]
        return RetentionPlan(grid, np.sort(np.concatenate([np.arange(per_unit), kept])), config.positions)

    return choose


class SkipSchedule(ReuseSchedule):
    """Computes kept patches only and reuses nothing: a patch sees the kept patches of its own unit."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        out, m = torch.empty_like(query), self.patches
        (clip,) = self.clips
        for _, rows, _ in clip.sequences():
            here = slice(rows.start * m, rows.stop * m)
            q, k, v = (x[here].transpose(0, 1)[None] for x in (query, key, value))
            out[here] = scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
        return out


@contextmanager
def variant(model: Any, selection: str, tower: str, batch: dict[str, Any]) -> Iterator[None]:
    """Lets `model` choose tokens and compute the tower in one of the ways that are compared."""
    with ExitStack() as stack:
        choose: Callable[..., RetentionPlan] = make_plan
        if selection.startswith("random"):
            choose = choose_random(selection == "random_unit0", np.random.default_rng(7))
        elif selection == "frames":
            choose = choose_frames
        elif selection == "cosine":
            features = model.model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
            choose = choose_cosine(iter(features.pooler_output))
        stack.enter_context(patch.object(evs_vllm.hf.model, "make_plan", choose))
        if tower == "skip":
            stack.enter_context(patch.object(evs_vllm.hf.tower, "ReuseSchedule", SkipSchedule))
        yield


# ---------------------------------------------------------------- asking


def readable(example: Example, kept: np.ndarray, per_unit: int) -> bool:
    """Whether the kept tokens show what the question asks for: what is lost beyond this, the model lost.

    A stay of the square is seen if its cell is kept in at least one unit of it.
    """
    units = np.arange(len(example.cells))
    square_kept = np.isin(units * per_unit + np.array(example.cells), kept)
    changes = np.concatenate([[0], np.cumsum(np.diff(example.cells) != 0)])
    seen = {int(stay) for stay in changes[square_kept]}
    last = int(changes[-1])
    if example.task == "count":
        return seen == set(range(last + 1))
    if example.task == "when":
        return int(changes[int(example.question.rstrip("?").split()[-1])]) in seen
    return (0 if example.task == "first" else last) in seen


@torch.no_grad()
def ask(
    folder: Path, examples: Sequence[Example], rate: float, selection: str, positions: str, tower: str, batch: int = 48
) -> dict[str, Any]:
    """Accuracy in %, in all and by task, of a checkpoint; what was kept; how many questions the kept tokens answer."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    if tower == "full":
        speed_up(model)
    encoder = {"encoder": "full"} if tower == "full" else {"encoder": "reuse"}
    refresh = {"encoder_refresh": 0} if tower == "skip" else {}
    hf.enable(model, 0, served_positions=True, positions=positions, **encoder, **refresh)
    collate = ChatCollator(transformers.AutoProcessor.from_pretrained(folder))
    right: list[bool] = []
    shown: list[bool] = []
    kept: list[int] = []
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        inputs = collate([as_item(example) for example in some])
        with variant(model, selection, tower, inputs):
            right += answers(model, inputs, rate)[0].tolist()
        for example, plan in zip(some, hf.last_plans(model), strict=True):
            kept.append(plan.num_kept)
            shown.append(readable(example, plan.kept, plan.tokens_per_unit))
    tasks = {
        task: 100 * statistics.mean(r for r, e in zip(right, examples, strict=True) if e.task == task)
        for task in sorted({e.task for e in examples})
    }
    return {
        "accuracy": 100 * statistics.mean(right),
        "readable": 100 * statistics.mean(shown),
        "tokens": statistics.mean(kept),
        "tasks": tasks,
        "right": "".join("1" if r else "0" for r in right),
    }


def measure(settings: Settings, folder: Path, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and asks; the content of the JSON file."""
    claim(folder, settings)
    examples = [make_example(settings.scenes, [5, number]) for number in range(settings.clips)]
    points = []
    started = time.time()
    for seed in settings.seeds:
        models = trained_models(folder / str(seed), settings, seed)
        log(f"seed {seed}: trained after {time.time() - started:.0f} s")
        for name, checkpoint in models.items():
            lines = [["evs", "keep", "full"], *(settings.compare if name != "control" else [])]
            for selection, positions, tower in lines:
                for rate in [0.0, *settings.ask_rates]:
                    if rate == 0 and (selection != "evs" or tower != "full"):
                        continue  # nothing is dropped: the same as EVS
                    point = {"seed": seed, "model": name, "selection": selection, "positions": positions}
                    point |= {"tower": tower, "rate": rate}
                    point |= ask(checkpoint, examples, rate, selection, positions, tower)
                    points.append(point)
                    log(f"{name} {selection} {positions} {tower} {rate:g}: {point['accuracy']:.1f} %")
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.time() - started),
        "command": "python " + " ".join(sys.argv),
        "points": points,
    }


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
    rows = ["| model | tokens | positions | tower | " + " | ".join(f"q={rate:g}" for rate in rates) + " |"]
    rows.append("|---" * 4 + "|---:" * len(rates) + "|")
    for key, cells in lines_of(result).items():
        texts = []
        for rate in rates:
            values = [point["accuracy"] for point in cells.get(rate, [])]
            spread = f" ± {interval(values):.1f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        rows.append("| " + " | ".join([*key, *texts]) + " |")
        if key == ("base", "evs", "keep", "full"):
            shown = [f"{statistics.mean(p['readable'] for p in cells[rate]):.1f}" for rate in rates]
            rows.append("| *answer still readable* | evs | | | " + " | ".join(shown) + " |")
    settings = result["settings"]
    units, seeds = settings["curriculum"][-1][0], len(settings["seeds"])
    rows.append(
        f"\n{settings['clips']} unseen clips of {units} units, {seeds} seed(s); "
        f"{result['seconds']} s; `{result['command']}`"
    )
    return "\n".join(rows) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against the share of tokens that stay, one curve per line of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for key, cells in lines_of(result).items():
        rates = sorted(cells)
        means = [statistics.mean(p["accuracy"] for p in cells[rate]) for rate in rates]
        axes.plot([1 - rate for rate in rates], means, marker="o", label=" ".join(key))
    axes.set(xscale="log", xlabel="share of video tokens kept", ylabel="right answers, %")
    axes.invert_xaxis()
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quality" / "full.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where checkpoints go")
    parser.add_argument("--out", type=Path, help="name of the result without suffix; printed only by default")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = measure(Settings.from_yaml(args.config), args.work)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result))
        plot(result, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
