# SPDX-License-Identifier: Apache-2.0
"""What `bench.selection` measures: a file of configs/selection."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.selection.conditions import CONDITIONS
from evs_vllm.config import EVSConfig
from evs_vllm.core.scorers import SELECTIONS
from evs_vllm.errors import ConfigError

CLIPS = ("report", "choose", "drawn")


@dataclass
class Settings:
    """A file of configs/selection. Every key has a default.

    Attributes:
        clips: "report" (what is published), "choose" (what methods are tried on) or "drawn" (in code, for the tests).
        tower: "pretrained", or "random" with tiny weights for the tests.
        grid: [rows, columns] of tokens of 28 x 28 pixels.
        units: At most so many units of a clip, of one frame each; a clip that is long enough has 4/5 of it at least.
        fps: Frames a second that are taken where the clip is long enough.
        conditions: Names in `bench.selection.conditions.CONDITIONS`, the first one "as it is".
        selections: Names in `SELECTIONS`; None for all.
        rates: Shares of the tokens to drop.
        drift_rates: The same for reuse in the tower; none leaves it out.
        drift: By name, the options (`EVSConfig`) of each way to compute less in the tower.
    """

    clips: str = "report"
    tower: str = "pretrained"
    grid: list[int] = field(default_factory=lambda: [9, 16])
    units: int = 40
    fps: float = 3.0
    conditions: list[str] = field(default_factory=lambda: list(CONDITIONS))
    selections: list[str] | None = None
    rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 0.95])
    drift_rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    drift: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.selections is None:
            self.selections = list(SELECTIONS)
        for key, values, allowed in (
            ("clips", [self.clips], CLIPS),
            ("tower", [self.tower], ("pretrained", "random")),
            ("conditions", self.conditions, CONDITIONS),
            ("selections", self.selections, SELECTIONS),
        ):
            if unknown := [value for value in values if value not in allowed]:
                raise ConfigError(f"{key} got {', '.join(unknown)}; allowed: {', '.join(allowed)}.")
        for options in self.drift.values():
            EVSConfig(rate=0.5, encoder="reuse", **options)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        """Reads a file.

        Raises:
            ConfigError: It has an unknown key or a value that is not allowed.
        """
        content = yaml.safe_load(Path(path).read_text()) or {}
        if unknown := set(content) - set(cls.__dataclass_fields__):
            raise ConfigError(f"{path}: unknown key(s) {sorted(unknown)}; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**content)
