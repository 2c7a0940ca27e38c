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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from torch.nn.functional import cosine_similarity, linear, scaled_dot_product_attention  # noqa: E402

import evs_vllm.hf.model  # noqa: E402
import evs_vllm.hf.tower  # noqa: E402
from evs_vllm import hf  # noqa: E402
from evs_vllm.errors import ConfigError  # noqa: E402
from evs_vllm.plan import RetentionPlan  # noqa: E402
from evs_vllm.reuse import ReuseSchedule  # noqa: E402
from evs_vllm.select import make_plan, token_budget  # noqa: E402
from evs_vllm.testing import make_model  # noqa: E402
from evs_vllm.train import recipe  # noqa: E402
from evs_vllm.train.data import ChatCollator, as_item  # noqa: E402
from evs_vllm.train.synthetic import Example, SceneSettings, make_example, shorter  # noqa: E402
from evs_vllm.train.trainer import answers  # noqa: E402

SCHEMA = 1
SELECTIONS = ("evs", "cosine", "random", "random_unit0", "frames")
TOWERS = ("full", "reuse", "skip")
_OF_THE_RUN = ("seeds", "clips", "ask_rates", "compare", "control")
"""Settings that leave each checkpoint as it is."""


@dataclass
class Settings:
    """A file of configs/quality. Every key has a default.

    Attributes:
        scene: What clips look like (`SceneSettings`); the last length of the curriculum is the one that is asked about.
        sizes: Of the model (`evs_vllm.testing.SIZES`).
        curriculum: [units, steps] of each stage of the base.
        further: Steps of the control and of the uptrained model, after the base.
        further_scene: What is different in the clips of these steps.
        further_learning_rate: Of these steps; a third of `learning_rate` by default.
        freeze_vision: Whether the vision tower stays as it is in these steps.
        control: Whether to train the control.
        batch: Clips of a mini-batch.
        learning_rate: Of the base.
        rates: What uptraining draws from (`RateSettings`).
        seeds: One base, control and uptrained model each.
        clips: How many unseen clips are asked about.
        ask_rates: At which rates, besides 0.
        compare: [selection, positions, tower] of each line of the table, besides ["evs", "keep", "full"].
    """

    scene: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "layers": 4,
            "vision_hidden": 64,
            "vision_layers": 2,
            "rope_theta": 1e6,
        }
    )
    curriculum: list[list[int]] = field(default_factory=lambda: [[8, 400], [16, 200], [32, 500]])
    further: int = 300
    further_scene: dict[str, Any] = field(default_factory=dict)
    further_learning_rate: float | None = None
    freeze_vision: bool = False
    control: bool = True
    batch: int = 32
    learning_rate: float = 1e-3
    rates: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    clips: int = 480
    ask_rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 0.93, 0.95])
    compare: list[list[str]] = field(
        default_factory=lambda: (
            [[s, "keep", "full"] for s in SELECTIONS[1:]]
            + [["evs", "sequential", "full"], ["evs", "keep", "reuse"], ["evs", "keep", "skip"]]
        )
    )

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        content = yaml.safe_load(Path(path).read_text()) or {}
        if unknown := set(content) - set(cls.__dataclass_fields__):
            raise ConfigError(f"{path}: unknown key(s) {sorted(unknown)}; known: {', '.join(cls.__dataclass_fields__)}")
        settings = cls(**content)
        for selection, positions, tower in settings.compare:
            if selection not in SELECTIONS or positions not in ("keep", "sequential") or tower not in TOWERS:
                raise ConfigError(f"{path}: bad line {[selection, positions, tower]} in compare")
        return settings

    @property
    def scenes(self) -> SceneSettings:
        return shorter(SceneSettings(**self.scene), self.curriculum[-1][0])


# ---------------------------------------------------------------- training


def untrained(folder: Path, settings: Settings, seed: int) -> Path:
    """A model with ordinary random weights (those of `make_model` are made for sharp comparisons, not for learning)."""
    make_model(folder, "qwen2_5_vl", seed=seed, **settings.sizes)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    # Attention within whole units in every layer: cells are too few for windows, and equal chunks train faster.
    model.config.vision_config.fullatt_block_indexes = list(range(model.config.vision_config.depth))
    # One ID per unit: heads are so small that only four frequencies turn with time, and the slowest must not turn half
    # around within a clip. Otherwise no head can look for the latest of something, and a model learns to look at the
    # last unit instead, which is gone once the clip is pruned.
    model.config.vision_config.tokens_per_second = 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.08, generator=generator)  # 0.02 does not start to learn in this depth
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
    model.save_pretrained(folder)
    return folder


def speed_up(model: Any) -> Any:
    """Lets the tower run its Conv3d as a matmul and units of equal size as a batch: most of the training time."""
    visual = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.visual

    def embed(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows.to(self.proj.weight.dtype).view(len(rows), -1), self.proj.weight.view(self.embed_dim, -1))

    def attend(self: Any, hidden_states: torch.Tensor, cu_seqlens: Any, position_embeddings: Any, **_: Any) -> Any:
        rows, units = len(hidden_states), len(cu_seqlens) - 1
        query, key, value = self.qkv(hidden_states).view(rows, 3, self.num_heads, -1).unbind(1)
        cos, sin = (x[:, None] for x in position_embeddings)
        query, key = (evs_vllm.hf.tower._rotate(x, cos, sin) for x in (query, key))
        query, key, value = (x.reshape(units, rows // units, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, -1))

    visual.patch_embed.forward = MethodType(embed, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    return model


def train(
    start: Path,
    out: Path,
    settings: Settings,
    scene: SceneSettings,
    steps: int,
    rates: dict[str, Any],
    seed: int,
    learning_rate: float,
    freeze_vision: bool = False,
) -> Path:
    """Trains from the checkpoint `start` and writes one to `out`, by the package's own recipe.

    Where `out` holds one of an earlier run (see `claim`), that is taken.
    """
    if (out / "trainer_state.json").is_file():
        return out
    described = recipe.Recipe.from_mapping(
        {
            "model": str(start),
            "data": {
                "synthetic": asdict(scene),
                "train_clips": steps * settings.batch,
                "eval_clips": 0,
                "seed": 1000 + seed,
            },
            "rates": {"seed": seed, **rates},
            "freeze_vision": freeze_vision,
            "trainer": {
                "output_dir": str(out),
                "max_steps": steps,
                "per_device_train_batch_size": settings.batch,
                "learning_rate": learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": min(30, steps // 10),
                "adam_beta2": 0.98,
                "weight_decay": 0.01,
                "logging_steps": 50,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
                "seed": seed,
            },
        }
    )
    load = recipe.load_model
    with patch.object(recipe, "load_model", lambda r: speed_up(load(r))):
        recipe.run(described)
    return out


def trained_models(folder: Path, settings: Settings, seed: int) -> dict[str, Path]:
    """Base, control and uptrained model of one seed."""
    dense = {"distribution": "list", "values": [0]}
    here = folder / "random"
    if not (here / "config.json").is_file():
        untrained(here, settings, seed)
    for stage, (units, steps) in enumerate(settings.curriculum):
        scene = shorter(settings.scenes, units)
        here = train(
            here, folder / f"base-{stage}", settings, scene, steps, dense, 100 * seed + stage, settings.learning_rate
        )
    models = {"base": here}
    if settings.further:
        scene = replace(settings.scenes, **settings.further_scene)
        for name, rates in (("control", dense), ("uptrained", settings.rates)):
            if name == "control" and not settings.control:
                continue
            rate = settings.further_learning_rate or settings.learning_rate / 3
            models[name] = train(
                here,
                folder / name,
                settings,
                scene,
                settings.further,
                rates,
                100 * seed + 50,
                rate,
                settings.freeze_vision,
            )
    return models


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


def claim(folder: Path, settings: Settings) -> None:
    """Makes `folder` one of these settings, so that a run that was interrupted or gets further seeds goes on there.

    Raises:
        ConfigError: It holds checkpoints of other settings.
    """
    described = json.dumps({k: v for k, v in asdict(settings).items() if k not in _OF_THE_RUN}, indent=1)
    path = folder / "settings.json"
    if path.is_file() and path.read_text() != described:
        raise ConfigError(f"{folder} holds checkpoints of other settings; give another --work or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(described)


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
