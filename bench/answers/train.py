# SPDX-License-Identifier: Apache-2.0
"""Trains the language models of `bench.answers` on views of scenes whose features are known.

As the tower sees each frame alone, any sequence of frames has the features of its frames: a view is a scene or a part
of it, at the full or a lower frame rate, forwards or backwards, or cut together from two. What is seen in its units
says what can be asked.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from bench.answers.model import TICKS, Prompt, Reader, clip_positions, collate
from bench.answers.questions import ask_about
from bench.answers.scenes import COLOURS, SHAPES, Seen, joined
from bench.answers.settings import Settings
from bench.selection.clips import as_clip
from evs_vllm.config import EVSConfig
from evs_vllm.core.selection import make_plan
from evs_vllm.train.rates import RateSampler

STRIDES = {1: 0.4, 2: 0.25, 3: 0.2, 4: 0.15}
"""How often a view takes every frame, every second and so on; positions follow the time. See `strides_of`."""
CUT, PART = 0.25, 0.3
"""How often a view is cut together from two scenes, and how often it is a part of what there is."""
LEAST = 4
"""Units of a view."""
WARM_UP = 25
"""Steps, at the start of every stage."""


@dataclass(frozen=True)
class Known:
    """A scene to learn from: (T, H, W, 3) uint8 frames, (T, P, C) fp16 features, and what is seen in each unit."""

    frames: np.ndarray
    features: torch.Tensor
    seen: tuple[tuple[Seen, ...], ...]


@dataclass(frozen=True)
class View(Known):
    """A sequence of units out of scenes; `ticks` are the positions from one to the next."""

    ticks: int = TICKS


def draw_view(scenes: Sequence[Known], units: int, rng: np.random.Generator) -> View:
    """A random view of at most so many units."""
    strides = strides_of(len(scenes[0].frames), units)
    stride = int(rng.choice(list(strides), p=list(strides.values())))
    first, second = (_thinned(scenes[rng.integers(len(scenes))], stride, rng) for _ in range(2))
    if rng.random() < CUT and min(len(first.frames), len(second.frames)) >= 2 * LEAST:
        at = int(rng.integers(LEAST // 2, len(first.frames) - LEAST // 2))
        first = View(
            np.concatenate([first.frames[:at], second.frames[at:]]),
            torch.cat([first.features[:at], second.features[at:]]),
            joined(first.seen[:at], second.seen[at:]),
        )
    count = min(units, len(first.frames))
    if count > LEAST and rng.random() < PART:
        count = int(rng.integers(LEAST, count))
    start = int(rng.integers(0, 1 + len(first.frames) - count))
    index = np.arange(start, start + count)
    return replace(_taken(first, index[::-1] if rng.random() < 0.5 else index), ticks=TICKS * stride)


def strides_of(length: int, units: int) -> dict[int, float]:
    """Those of `STRIDES` by which a scene of `length` units gives at most `units`, or the largest, and how often."""
    fit = {stride: often for stride, often in STRIDES.items() if -(-length // stride) <= units} or {max(STRIDES): 1.0}
    return {stride: often / sum(fit.values()) for stride, often in fit.items()}


def _thinned(scene: Known, stride: int, rng: np.random.Generator) -> View:
    return _taken(scene, np.arange(int(rng.integers(stride)), len(scene.frames), stride))


def _taken(scene: Known, index: np.ndarray) -> View:
    seen = tuple(scene.seen[t] for t in index)
    return View(scene.frames[index], scene.features[torch.from_numpy(index.copy())], seen)


def prompt_of(view: View, grid: Sequence[int], rate: float, rng: np.random.Generator) -> Prompt:
    """A view with all that can be asked about it, pruned by the default selection."""
    tokens = view.features.flatten(0, 1)
    kept = torch.arange(len(tokens))
    if rate:
        kept = torch.from_numpy(make_plan(as_clip(np.ascontiguousarray(view.frames)), EVSConfig(rate=rate)).kept)
    positions, text_from = clip_positions(kept, (len(view.frames), grid[0], grid[1]), ticks=view.ticks)
    return Prompt(tokens[kept], positions, text_from, ask_about(view.seen, rng))


def new_model(settings: Settings, scenes: Sequence[Known], seed: int) -> Reader:
    """A model with random weights that knows the mean and the spread of the features."""
    torch.manual_seed(seed)
    model = Reader(scenes[0].features.shape[-1], settings.model_shape())
    some = torch.cat([scene.features[::4].flatten(0, 1).float() for scene in scenes[:200]])
    model.mean.copy_(some.mean(0))
    model.spread.copy_(some.std(0) + 1e-3)
    return model


def align(
    model: Reader,
    scenes: Sequence[Known],
    grid: Sequence[int],
    steps: int,
    seed: int,
    log: Callable[[str], None] = print,
) -> None:
    """Teaches the merger, in place, to name what a token shows: colour, shape, row and column.

    Large models are made ready for a tower by captions; few weights and scenes do not find out by questions alone what
    a colour is. The heads that name are thrown away.

    Args:
        model: The model, new.
        scenes: What is learned from.
        grid: (rows, columns) of tokens.
        steps: Of 512 tokens each, half of which show an object.
        seed: Of the heads and the tokens.
        log: Told how it ends.
    """
    rows, labels = _labelled(scenes, grid)
    shown = labels[:, 0] > 0
    objects, others = shown.nonzero().flatten(), (~shown).nonzero().flatten()
    torch.manual_seed(seed)
    sizes = [int(labels[:, column].max()) + 1 for column in range(labels.shape[1])]
    heads = torch.nn.Linear(model.shape.width, sum(sizes))
    optimiser = torch.optim.AdamW([*model.merger.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
    right = []
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        drawn = torch.cat([each[torch.randint(len(each), (256,))] for each in (objects, others)])
        seen = (rows[drawn].float() - model.mean) / model.spread
        with torch.autocast("cpu", torch.bfloat16):
            # Some numbers of a token are left out at random: no few of them should say it all.
            told = heads(F.normalize(model.merger(F.dropout(seen, 0.2)), dim=-1) * model.shape.width**0.5).float()
        parts = list(zip(told.split(sizes, dim=1), labels[drawn].unbind(1), strict=True))
        loss = sum((F.cross_entropy(part, wanted) for part, wanted in parts), torch.zeros(()))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        right.append([float((part.argmax(1) == wanted).float().mean()) for part, wanted in parts])
    shares = ", ".join(f"{share:.1%}" for share in np.mean(right[-100:], axis=0))
    log(f"colour, shape, row and column of tokens named rightly: {shares}")


NEAR, FAR = 0.14, 0.3
"""A token shows an object whose middle is nearer than this, by the frame's sides, and none if all are farther off."""


def _labelled(scenes: Sequence[Known], grid: Sequence[int], every: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of every second unit, (R, C) fp16, and (R, 4) int64: colour and shape from 1 on, 0 for none; row, column.

    Tokens at the border of an object are left out.
    """
    height, width = grid
    middles = [((row + 0.5) / height, (column + 0.5) / width) for row in range(height) for column in range(width)]
    rows, labels = [], []
    for scene in scenes:
        for t in range(0, len(scene.seen), every):
            for place, (y, x) in enumerate(middles):
                off = {max(abs(seen.x - x), abs(seen.y - y)): seen for seen in scene.seen[t]}
                nearest = min(off, default=1.0)
                if NEAR <= nearest < FAR:
                    continue
                seen = off[nearest] if nearest < NEAR else None
                what = (1 + list(COLOURS).index(seen.colour), 1 + SHAPES.index(seen.shape)) if seen else (0, 0)
                rows.append(scene.features[t, place])
                labels.append((*what, place // width, place % width))
    return torch.stack(rows), torch.tensor(labels)


def train(
    model: Reader,
    scenes: Sequence[Known],
    settings: Settings,
    stages: Sequence[Sequence[int]],
    learning_rate: float,
    seed: int,
    rates: RateSampler | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Trains in place.

    Args:
        model: The model.
        scenes: What is learned from.
        settings: The grid.
        stages: [largest number of units, steps, views a step] each.
        learning_rate: The highest one; in each stage it grows at first, then falls to 0.
        seed: Of the views, the questions and the dropout. Equal seeds give equal views.
        rates: Where each step's rate is drawn from; by default nothing is dropped.
        log: Told how it goes.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 11])
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate, betas=(0.9, 0.98),
    )  # fmt: skip
    plan = [(units, size, step / steps, step) for units, steps, size in stages for step in range(1, steps + 1)]
    started, losses, right = time.time(), [], []
    model.train()
    for number, (units, size, share, step) in enumerate(plan, 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, step / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
        rate = rates.draw() if rates else 0.0
        views = [draw_view(scenes, units, rng) for _ in range(size)]
        batch = collate([prompt_of(view, settings.grid, rate, rng) for view in views])
        with torch.autocast("cpu", torch.bfloat16):
            told = model(batch)
        loss = F.cross_entropy(told, batch.answers)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        right.append(float((told.argmax(-1) == batch.answers).float().mean()))
        if number % 100 == 0 or number == len(plan):
            log(
                f"step {number}/{len(plan)}, {time.time() - started:.0f} s: loss {np.mean(losses[-100:]):.3f}, "
                f"right {np.mean(right[-100:]):.1%}"
            )
    model.eval()
