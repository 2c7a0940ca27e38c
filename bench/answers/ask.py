# SPDX-License-Identifier: Apache-2.0
"""Asks a model of `bench.answers`: which tokens it is shown, with which positions, and what the tower computed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.answers.features import PatchFeatures
from bench.answers.model import Prompt, Reader, clip_positions, collate
from bench.answers.questions import Question, ask_about
from bench.answers.scenes import Scene
from bench.answers.settings import AS_STREAM, CHUNK, STREAM, Settings, Way
from bench.selection import ways
from bench.selection.clips import as_clip
from bench.stream.loss import by_hindsight, chunked, mask_of
from evs_vllm.config import EVSConfig
from evs_vllm.core.selection import plan_keeping
from evs_vllm.options import exact

SEED = 5
TOGETHER = 8
"""Scenes that are asked about at a time."""


class Case:
    """A scene, what is asked about it, and what each way shows of it.

    Args:
        scene: The scene.
        settings: Ways, rates and options.
        features: The tower.
        number: The scene's number, a seed of the questions.
    """

    def __init__(self, scene: Scene, settings: Settings, features: PatchFeatures, number: int) -> None:
        self.scene, self._settings = scene, settings
        self.questions: list[Question] = ask_about(scene.seen, np.random.default_rng([SEED, number]))
        self.full = features.of(scene.frames)
        self.kept: dict[tuple[str, float], torch.Tensor] = {}
        """By selection and rate, (K,) int64."""
        self.computed: dict[tuple[str, str, float], float] = {}
        """By selection, tower and rate, the share of the tokens that the tower computes."""
        self._rows: dict[tuple[str, str, float], torch.Tensor] = {}
        known = ways.Scene(scene.name, scene.frames, as_clip(scene.frames), self.full)
        for rate in settings.ask_rates:
            count = math.floor(self.full[..., 0].numel() * (1 - exact(rate)))
            for selection in dict.fromkeys(way.selection for way in settings.all_ways()):
                mask = choose(known, count, rate, selection)
                if selection not in (STREAM, AS_STREAM) and int(mask.sum()) != count:
                    raise RuntimeError(f"{selection} keeps {int(mask.sum())} tokens of {scene.name}, not {count}.")
                self.kept[selection, rate] = mask.flatten().nonzero().flatten()
            for selection, _, tower in settings.all_ways():
                if tower != "full" and (selection, tower, rate) not in self._rows:
                    self._run_tower(known, features, selection, tower, rate)

    def _run_tower(self, known: ways.Scene, features: PatchFeatures, selection: str, tower: str, rate: float) -> None:
        """What a tower that does not compute everything makes of the kept tokens."""
        kept = self.kept[selection, rate]
        options = {**self._settings.options, **({"encoder_refresh": 0} if tower == "skip" else {})}
        plan = plan_keeping(kept, known.clip, EVSConfig(rate=rate, encoder="reuse", **options))
        computed = torch.zeros(plan.num_tokens, dtype=torch.bool)
        computed[torch.from_numpy(plan.computed)] = True
        made = features.of(known.frames, computed.view(plan.num_units, -1), tower)
        self.computed[selection, tower, rate] = float(computed.float().mean())
        self._rows[selection, tower, rate] = made.flatten(0, 1)[kept]

    def share_kept(self, selection: str, rate: float) -> float:
        """The share of the tokens that a selection keeps, 0 to 1."""
        return len(self.kept[selection, rate]) / self.full[..., 0].numel()

    def prompt(self, way: Way, rate: float) -> Prompt:
        """What a model is given. At rate 0 every way is the same but for the positions."""
        units, grid = len(self.full), self._settings.grid
        kept = self.kept[way.selection, rate] if rate else torch.arange(self.full[..., 0].numel())
        if rate and way.tower != "full":
            rows = self._rows[way.selection, way.tower, rate]
        else:
            rows = self.full.flatten(0, 1)[kept]
        positions, text_from = clip_positions(kept, (units, grid[0], grid[1]), way.positions)
        return Prompt(rows, positions, text_from, self.questions)


def choose(known: ways.Scene, count: int, rate: float, selection: str) -> torch.Tensor:
    """(T, P) bool, unit 0 whole and `count` tokens in all; of a stream, and as one, as many as the stream keeps."""
    if selection in (STREAM, AS_STREAM):
        stream = mask_of(chunked(known.clip, CHUNK, EVSConfig(rate=rate, stream=True)))
        return stream if selection == STREAM else by_hindsight(known.clip, int(stream.sum()))
    others = {"random": ways.at_random, "whole units": ways.whole_units}
    if selection in others:
        return others[selection](known, count)
    return ways.of_package(known, count, rate, selection)


@torch.inference_mode()
def answers(model: Reader, cases: Sequence[Case], way: Way, rate: float) -> list[bool]:
    """For each question of each case, whether the model's most likely word is the right one."""
    right: list[bool] = []
    for start in range(0, len(cases), TOGETHER):
        batch = collate([case.prompt(way, rate) for case in cases[start : start + TOGETHER]])
        with torch.autocast("cpu", torch.bfloat16):
            told = model(batch)
        right += (told.argmax(-1) == batch.answers).tolist()
    return right


def points(model: Reader, cases: Sequence[Case], settings: Settings) -> list[dict[str, Any]]:
    """One row per way and rate: "accuracy" in %, and "right", question by question as 0 and 1."""
    dense = settings.all_ways()[0]
    rows = []
    for rate in [0.0, *settings.ask_rates]:
        for way in settings.all_ways() if rate else [dense]:
            right = answers(model, cases, way, rate)
            rows.append({
                **way._asdict(), "rate": rate, "accuracy": 100 * float(np.mean(right)),
                "right": "".join("1" if each else "0" for each in right),
            })  # fmt: skip
    return rows
