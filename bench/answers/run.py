# SPDX-License-Identifier: Apache-2.0
"""Runs `bench.answers`: features, training, asking. Each is kept on disk, so that a run goes on where one ended."""

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.answers.ask import Case, points
from bench.answers.features import PatchFeatures
from bench.answers.model import Reader
from bench.answers.scenes import Maker
from bench.answers.settings import Settings
from bench.answers.train import Known, align, new_model, train
from bench.common import harness
from bench.common.fetch import sha256_of
from bench.common.pretrained_tower import pretrained_path, pretrained_tower, random_tower
from evs_vllm.train.rates import RateSampler

SCHEMA = 1
TRAINING = 1
"""Raise it when the same settings train other models than before."""
EVERY = 50
"""Scenes between two lines of the log."""

Log = Callable[[str], None]


class Lab:
    """What a run holds.

    Args:
        settings: The settings.
        work: Where trained models are kept.
        log: Told how it goes.
    """

    def __init__(self, settings: Settings, work: Path, log: Log) -> None:
        self.settings, self.work, self._log = settings, work, log
        tower = pretrained_tower() if settings.tower == "pretrained" else random_tower(depth=2, width=64, seed=0)
        self.features = PatchFeatures(tower, (settings.grid[0], settings.grid[1]))
        self._known: list[Known] | None = None
        self.started = time.time()

    def log(self, text: str) -> None:
        """Says something, with the time since the start."""
        self._log(f"[{time.time() - self.started:5.0f} s] {text}")

    def maker(self, use: str, cuts: float = 0.0) -> Maker:
        """Makes the scenes of a use."""
        return Maker(use, (self.settings.grid[0], self.settings.grid[1]), self.settings.units, cuts)

    def known(self) -> list[Known]:
        """The scenes to learn from. Views of them are cut together while training."""
        if self._known is None:
            maker, found = self.maker(self.settings.train), []
            for number in range(self.settings.train_scenes):
                scene = maker.make(number)
                found.append(Known(scene.frames, self.features.of(scene.frames), scene.seen))
                if (number + 1) % EVERY == 0:
                    self.log(f"{number + 1} of {self.settings.train_scenes} scenes to learn from")
            self._known = found
        return self._known

    def cases(self) -> list[Case]:
        """The scenes to ask about, with what every way shows of them."""
        # Other numbers than those to learn from, which matters where both are drawn.
        maker, first, found = self.maker(self.settings.ask, self.settings.cuts), 1_000_000, []
        for number in range(first, first + self.settings.ask_scenes):
            found.append(Case(maker.make(number), self.settings, self.features, number))
            if len(found) % EVERY == 0:
                self.log(f"{len(found)} of {self.settings.ask_scenes} scenes to ask about")
        return found

    def model(self, seed: int, name: str) -> Reader:
        """A trained model, trained if it is not there."""
        settings = self.settings
        key = json.dumps([TRAINING, self.features.tower.identity, settings.training()], sort_keys=True)
        path = self.work / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{seed}-{name}.pt"
        if path.exists():
            model = Reader(self.features.width, settings.model_shape())
            model.load_state_dict(torch.load(path))
            return model.eval()

        def say(text: str) -> None:
            self.log(f"{name} {seed}, {text}")

        if name == "base":
            model = new_model(settings, self.known(), seed)
            align(model, self.known(), settings.grid, settings.align, seed, say)
            train(model, self.known(), settings, settings.stages, settings.learning_rate, seed, log=say)
        else:
            model = copy.deepcopy(self.model(seed, "base"))
            sampler = RateSampler(replace(settings.rate_settings(), seed=seed)) if name == "uptrained" else None
            rate = settings.further_learning_rate
            train(model, self.known(), settings, settings.further, rate, seed + 1000, sampler, say)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), part)
        part.replace(path)
        return model


def measure(settings: Settings, work: Path, log: Log = print) -> dict[str, Any]:
    """Trains and asks; the content of the result file."""
    environment = harness.environment()
    lab = Lab(settings, work, log)
    hashes = {name: sha256_of(path) for name, path in lab.maker(settings.ask).paths.items()}
    if settings.tower == "pretrained":
        hashes["tower"] = sha256_of(pretrained_path())
    models = {(seed, name): lab.model(seed, name) for seed in settings.seeds for name in settings.models}
    cases = lab.cases()
    found = []
    for (seed, name), model in models.items():
        found += [{"seed": seed, "model": name} | row for row in points(model, cases, settings)]
        lab.log(f"asked {name} {seed}")
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "environment": environment,
        "seconds": round(time.time() - lab.started),
        "weights": sum(each.numel() for each in models[settings.seeds[0], "base"].parameters()),
        "sha256": hashes,
        "scenes": [
            {
                "name": case.scene.name, "kind": case.scene.kind, "camera": case.scene.camera,
                "light": case.scene.light, "cut": case.scene.cut,
                "questions": [[each.task, " ".join(each.words), each.answer] for each in case.questions],
            }
            for case in cases
        ],
        "kept": [
            {"selection": way[0], "rate": way[1], "kept": float(np.mean([case.share_kept(*way) for case in cases]))}
            for way in cases[0].kept
        ],
        "computed": [
            {"selection": way[0], "tower": way[1], "rate": way[2],
             "computed": float(np.mean([case.computed[way] for case in cases]))}
            for way in cases[0].computed
        ],
        "points": found,
    }  # fmt: skip
