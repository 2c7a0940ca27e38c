# SPDX-License-Identifier: Apache-2.0
"""Asks a trained model of the quality lab about clips: ways to choose tokens, ways to compute them."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling

import evs_kernels
from bench.quality.models import speed_up
from evs_vllm import hf
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.schedule import ReuseSchedule
from evs_vllm.core.scorers import Scorer, Selection, named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.families import family_of
from evs_vllm.families.front_end import CELLS, sources_of_cells
from evs_vllm.families.qwen2_vl import GRID, PIXELS
from evs_vllm.hf import tower
from evs_vllm.train.data import ChatCollator, as_item
from evs_vllm.train.synthetic import Example
from evs_vllm.train.trainer import answers

FAMILY = family_of("Qwen2_5_VLForConditionalGeneration")
assert FAMILY is not None
FOCUS_TENTHS, FOCUS_WEIGHT = 3, 16
"""What a client focuses on that asks for a time: so many tenths of the clip up to then, by this weight."""

# ---------------------------------------------------------------- other ways to choose, and to compute


class RandomTokens(Selection):
    """As many tokens as EVS keeps, at random; with `keep_first` unit 0 stays whole."""

    def __init__(self, keep_first: bool, generator: np.random.Generator) -> None:
        self.name = "random_unit0" if keep_first else "random"
        self._keep_first, self._generator = keep_first, generator

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        count = token_budget(clip.num_units, clip.tokens_per_unit, config)
        first = clip.tokens_per_unit if self._keep_first else 0
        others = first + self._generator.permutation(clip.num_units * clip.tokens_per_unit - first)[: count - first]
        return torch.from_numpy(np.sort(np.concatenate([np.arange(first), others])))


class WholeUnits(Selection):
    """As many whole units, evenly spread from the first to the last, as fit the number of tokens that EVS keeps."""

    name = "frames"

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        units, per_unit = clip.num_units, clip.tokens_per_unit
        count = max(1, token_budget(units, per_unit, config) // per_unit)
        wanted = np.unique(np.linspace(0, units - 1, count).round().astype(np.int64))
        return torch.from_numpy((wanted[:, None] * per_unit + np.arange(per_unit)).reshape(-1))


class EmbeddingChange(Scorer):
    """The paper's other score: one minus the cosine of a token's embedding to that of its place one unit earlier.

    Args:
        embeddings: What the whole tower makes of each clip, (T*P, hidden), in the order in which clips are scored. A
            server does not have them when it lays out the prompt.
    """

    name = "cosine"

    def __init__(self, embeddings: Sequence[torch.Tensor]) -> None:
        self._embeddings = iter(embeddings)

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        return evs_kernels.cosine_score(next(self._embeddings).float().view(*tokens.shape[:2], -1).contiguous())

    def level(self, threshold: float, values: int) -> float:
        """A threshold is a distance, from 0 to 2."""
        return threshold


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


class Variant(NamedTuple):
    """How a question is asked: which tokens stay, with which positions, and what the tower computes."""

    selection: str = "evs"
    positions: str = "keep"
    tower: str = "full"

    def settings(self, rate: float, example: Example) -> EVSConfig:
        """What a user would ask for; with selection "focus", one that knows for which time the question asks."""
        encoder = "full" if self.tower == "full" else "reuse"
        more: dict[str, Any] = {"encoder_refresh": 0} if self.tower == "skip" else {}
        if self.selection == "focus" and example.asked is not None:
            seconds = 2 / example.fps * np.array([example.asked + 1, len(example.frames) // 2])
            start = max(0.0, float(seconds[0] - seconds[1] * FOCUS_TENTHS / 10))
            more["focus"] = ((start, float(seconds[0]), FOCUS_WEIGHT),)
        return EVSConfig(rate=rate, positions=self.positions, encoder=encoder, **more)

    def chooses(self, features: Sequence[torch.Tensor], seed: int) -> Selection | None:
        """How tokens are chosen: None is what users get.

        Args:
            features: What the whole tower makes of each clip.
            seed: Seed of random tokens.
        """
        if self.selection.startswith("random"):
            return RandomTokens(self.selection == "random_unit0", np.random.default_rng([7, seed]))
        others = {"frames": WholeUnits(), "cosine": EmbeddingChange(features), "evs": None, "focus": None}
        return others[self.selection] if self.selection in others else named_selection(self.selection)


class Towers:
    """Runs the tower of a transformers model, with reuse or without, for variants that are compared.

    Args:
        share: Whether variants that need the same of the same clip in memory compute it once.
    """

    def __init__(self, share: bool = True) -> None:
        self._share = share
        self._memory: dict[Any, torch.Tensor] = {}
        self.schedule: type[ReuseSchedule] = ReuseSchedule

    def forget(self) -> None:
        """Other clips follow, possibly at the same addresses."""
        self._memory.clear()

    def encode(self, visual: Any, pixels: torch.Tensor, plan: RetentionPlan) -> torch.Tensor:
        """As `evs_vllm.hf.tower.encode`."""
        key = (pixels.data_ptr(), plan.computed.tobytes(), self.schedule)
        if not self._share or key not in self._memory:
            self._memory[key] = tower.encode(visual, pixels, plan, self.schedule)
        return self._memory[key]


@contextmanager
def known_features(model: Any, features: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it, transformers' model does not compute again what its whole tower makes of the clips."""
    known = BaseModelOutputWithPooling(pooler_output=features)
    with patch.object(model.model, "get_video_features", lambda *_, **__: copy(known)):
        yield


# ---------------------------------------------------------------- asking


def unit_starts(example: Example) -> tuple[float, ...]:
    """When each unit of a drawn clip begins, in seconds."""
    return tuple(2 / example.fps * unit for unit in range(len(example.frames) // 2))


def readable(example: Example, kept: np.ndarray, per_unit: int) -> bool:
    """Whether the kept tokens show what the question asks for: what is lost beyond this, the model lost.

    A visit is seen if its cell is kept in at least one unit of it. Of the scene at some time, the latest kept token up
    to then has to show the same.
    """
    tokens = set(kept.tolist())
    seen = [any(t * per_unit + v.cell in tokens for t in range(v.begin, v.end)) for v in example.visits]
    if example.task == "count":
        return all(seen)
    if example.task == "when":
        return seen[max(number for number, v in enumerate(example.visits) if v.begin <= example.asked)]
    if example.task == "scene":
        before = kept[kept < (example.asked + 1) * per_unit]
        return bool(len(before)) and example.scene[before.max() // per_unit] == example.answer
    return seen[0 if example.task == "first" else -1]


@torch.no_grad()
def ask(
    folder: Path,
    examples: Sequence[Example],
    cells: Sequence[tuple[Variant, float]],
    batch: int = 48,
    share: bool = True,
) -> list[dict[str, Any]]:
    """Asks a checkpoint all questions in each of several variants, at a rate each.

    Args:
        folder: The checkpoint.
        examples: The questions.
        cells: The variants and rates.
        batch: Questions asked together.
        share: Whether variants share the work that is the same.

    Returns:
        For each cell: accuracy in %, in all and by task; tokens kept, mean; `readable`, the share in % of questions
        that the kept tokens answer; `right` and `shown`, the same question by question.
    """
    model = speed_up(transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval())
    towers = Towers(share)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    hf.enable(model, 0, processor=processor, served_positions=True, encode=towers.encode)
    adapter = FAMILY.bind(model.config, processor=processor)
    collate = ChatCollator(processor)
    results: list[list[tuple[bool, bool, int]]] = [[] for _ in cells]
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        inputs = collate([as_item(example) for example in some])
        pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        features = model.model.get_video_features(pixels, grids, return_dict=True).pooler_output
        rows = pixels.split(grids.prod(-1).tolist())
        clips = [adapter.clip({PIXELS: own, GRID: grid}) for own, grid in zip(rows, grids, strict=True)]
        sources = sources_of_cells(inputs[CELLS], [clip.grid for clip in clips])
        clips = [
            replace(clip, source=source, starts=unit_starts(example))
            for clip, source, example in zip(clips, sources, some, strict=True)
        ]
        towers.forget()
        for (variant, rate), found in zip(cells, results, strict=True):
            given: dict[str, Any] = {}
            if rate:
                selection = variant.chooses(features, start)
                given["evs_plans"] = [
                    make_plan(clip, variant.settings(rate, example), selection)
                    for clip, example in zip(clips, some, strict=True)
                ]
            towers.schedule = SkipSchedule if variant.tower == "skip" else ReuseSchedule
            with known_features(model, features) if variant.tower == "full" else nullcontext():
                right = answers(model, inputs, rate, evs_positions=variant.positions, **given)[0].tolist()
            for answered, example, plan in zip(right, some, hf.last_plans(model), strict=True):
                found.append((answered, readable(example, plan.kept, plan.tokens_per_unit), plan.num_kept))
    return [summary(examples, *zip(*rows, strict=True)) for rows in results]


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
        "shown": "".join("1" if s else "0" for s in shown),
    }
