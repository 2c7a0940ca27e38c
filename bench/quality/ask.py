# SPDX-License-Identifier: Apache-2.0
"""Asks a trained model of the quality lab (`quality.py`) about clips: ways to choose tokens, ways to compute them."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling

import evs_vllm.families.qwen2_vl
import evs_vllm.hf.model
from bench.quality.models import speed_up
from evs_vllm import hf
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import ReuseSchedule
from evs_vllm.core.selection import plan_keeping, token_budget
from evs_vllm.train.data import ChatCollator, as_item
from evs_vllm.train.synthetic import Example
from evs_vllm.train.trainer import answers

# ---------------------------------------------------------------- other ways to choose, and to compute


Chooser = Callable[[torch.Tensor, int], torch.Tensor]
"""From a clip's (T, P, D) uint8 tokens and a number to the indices of the tokens that stay, sorted."""


def choose_random(keep_first: bool, generator: np.random.Generator) -> Chooser:
    """As many tokens as EVS keeps, at random; with `keep_first` unit 0 stays whole."""

    def choose(tokens: torch.Tensor, count: int) -> torch.Tensor:
        units, per_unit, _ = tokens.shape
        first = per_unit if keep_first else 0
        others = first + generator.permutation(units * per_unit - first)[: count - first]
        return torch.from_numpy(np.sort(np.concatenate([np.arange(first), others])))

    return choose


def choose_frames(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """As many whole units, evenly spread from the first to the last, as fit the number of tokens that EVS keeps."""
    units, per_unit, _ = tokens.shape
    wanted = np.unique(np.linspace(0, units - 1, max(1, count // per_unit)).round().astype(np.int64))
    return torch.from_numpy((wanted[:, None] * per_unit + np.arange(per_unit)).reshape(-1))


def choose_cosine(embeddings: Iterator[torch.Tensor]) -> Chooser:
    """The paper's other score: one minus the cosine of a token's embedding to that of its place one unit earlier."""

    def choose(tokens: torch.Tensor, count: int) -> torch.Tensor:
        units, per_unit, _ = tokens.shape
        rows = next(embeddings).view(units, per_unit, -1)
        score = 1 - cosine_similarity(rows[1:], rows[:-1], dim=-1)
        best = torch.argsort(-score.flatten(), stable=True)[: count - per_unit]
        return torch.cat([torch.arange(per_unit), per_unit + best]).sort().values

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


class Way(NamedTuple):
    """How a question is asked: which tokens stay, with which positions, and what the tower computes."""

    selection: str = "evs"
    positions: str = "keep"
    tower: str = "full"


@contextmanager
def chosen(model: Any, way: Way, features: Sequence[torch.Tensor], seed: int) -> Iterator[None]:
    """Lets `model` choose tokens and compute the tower in one of the ways that are compared.

    Args:
        model: With EVS enabled.
        way: The way.
        features: What the whole tower computes of each clip: it is the same for every way.
        seed: Of random tokens.
    """
    chooser: Chooser | None = None
    if way.selection.startswith("random"):
        chooser = choose_random(way.selection == "random_unit0", np.random.default_rng([7, seed]))
    elif way.selection == "frames":
        chooser = choose_frames
    elif way.selection == "cosine":
        chooser = choose_cosine(iter(features))

    def plan(tokens: torch.Tensor, grid: tuple[int, int, int], config: Any) -> RetentionPlan:
        assert chooser is not None
        return plan_keeping(chooser(tokens, token_budget(*tokens.shape[:2], config)), tokens, grid, config)

    with ExitStack() as stack:
        if chooser is not None:
            stack.enter_context(patch.object(evs_vllm.hf.model, "make_plan", plan))
        if way.tower == "full":
            stack.enter_context(
                patch.object(
                    model.model,
                    "get_video_features",
                    lambda *_, **__: BaseModelOutputWithPooling(pooler_output=features),
                )
            )
        if way.tower == "skip":
            skip = partial(evs_vllm.hf.model.encode, schedule=SkipSchedule)
            stack.enter_context(patch.object(evs_vllm.hf.model, "encode", skip))
        yield


@contextmanager
def shared_work() -> Iterator[None]:
    """Within it, of the same clips in memory, ways that need the same compute it once.

    That is the pixels as bytes, and what a tower makes of a clip of which it leaves the same patches out.
    """
    memory: dict[Any, torch.Tensor] = {}
    to_uint8, encode = evs_vllm.families.qwen2_vl.to_uint8, evs_vllm.hf.model.encode

    def to_uint8_once(rows: torch.Tensor, channels: int, stats: Any) -> torch.Tensor:
        key = (rows.data_ptr(), rows.shape)
        if key not in memory:
            memory[key] = to_uint8(rows, channels, stats)
        return memory[key]

    def encode_once(
        visual: Any, clip: torch.Tensor, plan: RetentionPlan, schedule: type[ReuseSchedule] = ReuseSchedule
    ) -> torch.Tensor:
        key = (clip.data_ptr(), plan.computed.tobytes(), schedule)
        if key not in memory:
            memory[key] = encode(visual, clip, plan, schedule)
        return memory[key]

    with (
        patch.object(evs_vllm.families.qwen2_vl, "to_uint8", to_uint8_once),
        patch.object(evs_vllm.hf.model, "encode", encode_once),
    ):
        yield


# ---------------------------------------------------------------- asking


def readable(example: Example, kept: np.ndarray, per_unit: int) -> bool:
    """Whether the kept tokens show what the question asks for: what is lost beyond this, the model lost.

    A visit is seen if its cell is kept in at least one unit of it.
    """
    tokens = set(kept.tolist())
    seen = [any(t * per_unit + v.cell in tokens for t in range(v.begin, v.end)) for v in example.visits]
    if example.task == "count":
        return all(seen)
    if example.task == "when":
        tenths, units = int(example.question.split(" tenths")[0].split()[-1]), len(example.frames) // 2
        return seen[max(number for number, v in enumerate(example.visits) if 10 * v.begin < tenths * units)]
    return seen[0 if example.task == "first" else -1]


@torch.no_grad()
def ask(
    folder: Path, examples: Sequence[Example], cells: Sequence[tuple[Way, float]], batch: int = 48
) -> list[dict[str, Any]]:
    """Asks a checkpoint all questions in each of several ways, at a rate each.

    Returns:
        For each cell: accuracy in %, in all and by task; tokens kept, mean; `readable`, the share in % of questions
        that the kept tokens answer; `right`, question by question.
    """
    model = speed_up(transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval())
    hf.enable(model, 0, served_positions=True)
    collate = ChatCollator(transformers.AutoProcessor.from_pretrained(folder))
    told: list[list[tuple[bool, bool, int]]] = [[] for _ in cells]
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        inputs = collate([as_item(example) for example in some])
        features = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        ).pooler_output
        with shared_work():
            for (way, rate), rows in zip(cells, told, strict=True):
                encoder: dict[str, Any] = {"evs_encoder": "full" if way.tower == "full" else "reuse"}
                if way.tower == "skip":
                    encoder["evs_encoder_refresh"] = 0
                with chosen(model, way, features, start):
                    right = answers(model, inputs, rate, evs_positions=way.positions, **encoder)[0].tolist()
                for answered, example, plan in zip(right, some, hf.last_plans(model), strict=True):
                    rows.append((answered, readable(example, plan.kept, plan.tokens_per_unit), plan.num_kept))
    return [summary(examples, *zip(*rows, strict=True)) for rows in told]


def summary(
    examples: Sequence[Example], right: Sequence[bool], shown: Sequence[bool], kept: Sequence[int]
) -> dict[str, Any]:
    """What `ask` returns for a cell."""
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
