# SPDX-License-Identifier: Apache-2.0
"""What `bench.answers` does: a file of configs/answers."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.answers.model import Shape
from evs_vllm.config import EVSConfig
from evs_vllm.core.scorers import SELECTIONS
from evs_vllm.errors import ConfigError
from evs_vllm.options import POSITIONS
from evs_vllm.train.rates import RateSettings

USES = ("train", "choose", "report", "drawn")
MODELS = ("base", "control", "uptrained")
STREAM, AS_STREAM = "stream", "as stream"
CHUNK = 4
"""Units of a stream's chunk."""
OTHERS = ("random", "whole units", STREAM, AS_STREAM)
"""Ways to choose tokens beside the selections of the package: two of `bench.selection.ways`; the scene as a stream of
chunks, which keeps what it will; and the scene as one clip with as many tokens as the stream kept."""
TOWERS = ("full", "reuse", "skip")


class Way(NamedTuple):
    """How a question is asked.

    Attributes:
        selection: A name in `SELECTIONS` or of `OTHERS`.
        positions: "keep" or "sequential".
        tower: "full": it computes every token. "reuse": what the plan says, and takes keys and values of the others
            from before. "skip": kept tokens only, the others are absent.
    """

    selection: str
    positions: str
    tower: str


@dataclass
class Settings:
    """A file of configs/answers. Every key has a default.

    Attributes:
        train, ask: Of what use the scenes are from which is learned and about which is asked (`USES`).
        tower: "pretrained", or "random" with tiny weights for the tests.
        grid: [rows, columns] of tokens of 28 x 28 pixels.
        units: T of a scene, of one frame each.
        cuts: The share of the scenes that are asked about which are cut together from two.
        train_scenes, ask_scenes: How many.
        shape: The model's size (`bench.answers.model.Shape`).
        align: Steps by which the merger learns to name what a token shows.
        stages: Of the base's training: [largest number of units, steps, views a step] each.
        further: The same of the control, without pruning, and of the uptrained model, at random rates.
        learning_rate, further_learning_rate: The highest of each training.
        rates: What uptraining draws from (`evs_vllm.train.rates.RateSettings`), with the selection that is the default.
        seeds: One base, control and uptrained model each.
        models: Which of `MODELS` are trained and asked; the base first.
        ask_rates: Shares of the tokens to drop.
        ways: `Way` by `Way` what is asked.
        options: Further options (`EVSConfig`) of every plan.
    """

    train: str = "train"
    ask: str = "report"
    tower: str = "pretrained"
    grid: list[int] = field(default_factory=lambda: [4, 4])
    units: int = 24
    cuts: float = 0.2
    train_scenes: int = 1000
    ask_scenes: int = 200
    shape: dict[str, Any] = field(default_factory=dict)
    align: int = 2000
    stages: list[list[int]] = field(default_factory=lambda: [[1, 500, 32], [2, 500, 32], [6, 1000, 16], [24, 400, 16]])
    further: list[list[int]] = field(default_factory=lambda: [[24, 200, 16]])
    learning_rate: float = 1.5e-3
    further_learning_rate: float = 5e-4
    rates: dict[str, Any] = field(default_factory=lambda: {"distribution": "beta", "alpha": 3, "beta": 1, "high": 0.93})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    models: list[str] = field(default_factory=lambda: list(MODELS))
    ask_rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    ways: list[list[str]] = field(default_factory=lambda: [["learned", "keep", "full"]])
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, values, allowed in (
            ("train and ask", [self.train, self.ask], USES),
            ("tower", [self.tower], ("pretrained", "random")),
            ("models", self.models, MODELS),
            ("ways: selection", [way[0] for way in self.ways], (*SELECTIONS, *OTHERS)),
            ("ways: positions", [way[1] for way in self.ways], POSITIONS),
            ("ways: tower", [way[2] for way in self.ways], TOWERS),
        ):
            if unknown := [value for value in values if value not in allowed]:
                raise ConfigError(f"{key} got {', '.join(unknown)}; allowed: {', '.join(allowed)}.")
        if any(way[0] in (STREAM, AS_STREAM) and way[2] != "full" for way in self.ways):
            raise ConfigError(f"ways: {STREAM} and {AS_STREAM} are asked with tower full only.")
        if self.train == self.ask != "drawn":
            raise ConfigError(f"train and ask are both {self.train}: what is learned from must not be asked about.")
        if self.models[:1] != ["base"]:
            raise ConfigError("models has to begin with base, from which the others go on.")
        self.model_shape()
        self.rate_settings()
        EVSConfig(rate=0.5, encoder="reuse", **self.options)

    def model_shape(self) -> Shape:
        """`shape` as an object."""
        return Shape(**self.shape)

    def rate_settings(self) -> RateSettings:
        """`rates` as an object, not yet with the seed of a model."""
        return RateSettings(**self.rates)

    def all_ways(self) -> list[Way]:
        """`ways` as objects."""
        return [Way(*way) for way in self.ways]

    def training(self) -> dict[str, Any]:
        """What shapes a trained model, for what is kept on disk."""
        asking = {"ask", "cuts", "ask_scenes", "seeds", "models", "ask_rates", "ways"}
        return {key: value for key, value in asdict(self).items() if key not in asking}

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        """Reads a file.

        Raises:
            ConfigError: It has an unknown key or a value that is not allowed.
        """
        content = yaml.safe_load(Path(path).read_text()) or {}
        known = [each.name for each in fields(cls)]
        if unknown := set(content) - set(known):
            raise ConfigError(f"{path}: unknown key(s) {sorted(unknown)}; known: {', '.join(known)}")
        return cls(**content)
