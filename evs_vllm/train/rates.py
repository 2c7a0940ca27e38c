# SPDX-License-Identifier: Apache-2.0
"""Draws the pruning rate of each mini-batch, and the selection if asked, from a generator of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evs_vllm.errors import ConfigError
from evs_vllm.options import SELECTION_NAMES

DISTRIBUTIONS = ("beta", "uniform", "list")


@dataclass(frozen=True)
class RateSettings:
    """From what rates are drawn.

    The paper draws from a Beta distribution and does not say which; Beta(2, 1), a mean of two thirds, is ours.

    Attributes:
        distribution: "beta" (Beta(alpha, beta) stretched to low..high), "uniform" (between low and high) or "list"
            (one of `values`, each as likely).
        alpha, beta: Parameters of "beta".
        low, high: 0 <= low < high < 1, for "beta" and "uniform".
        values: Rates of "list".
        selections: Names of selections, of which one is drawn for each mini-batch, each as likely. With none every
            batch has the model's own.
        seed: Seed of the generator.

    Raises:
        ConfigError: A value is not allowed.
    """

    distribution: str = "beta"
    alpha: float = 2.0
    beta: float = 1.0
    low: float = 0.0
    high: float = 0.95
    values: tuple[float, ...] = ()
    selections: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigError(f"rates.distribution got {self.distribution!r}; allowed: {', '.join(DISTRIBUTIONS)}.")
        if not 0 <= self.low < self.high < 1:
            raise ConfigError(f"rates.low={self.low} and rates.high={self.high}: 0 <= low < high < 1 is needed.")
        if self.alpha <= 0 or self.beta <= 0:
            raise ConfigError(f"rates.alpha={self.alpha} and rates.beta={self.beta} must be positive.")
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "selections", tuple(self.selections))
        if unknown := [name for name in self.selections if name not in SELECTION_NAMES]:
            raise ConfigError(f"rates.selections got {', '.join(unknown)}; allowed: {', '.join(SELECTION_NAMES)}.")
        if (self.distribution == "list") != bool(self.values):
            raise ConfigError("rates.values goes with distribution 'list', and that needs at least one.")
        if not all(0 <= value < 1 for value in self.values):
            raise ConfigError(f"rates.values got {list(self.values)}; each must be from 0 up to but not including 1.")


class RateSampler:
    """A stream of rates and selections. Equal settings give equal streams, so all data-parallel ranks draw the same.

    The generator is its own: neither data loading nor dropout moves it, nor does it move them.
    """

    def __init__(self, settings: RateSettings) -> None:
        self.settings = settings
        self._generator = np.random.default_rng(settings.seed)

    def draw(self) -> float:
        """The next rate, with 4 decimals."""
        s = self.settings
        if s.distribution == "list":
            return float(s.values[self._generator.integers(len(s.values))])
        share = self._generator.beta(s.alpha, s.beta) if s.distribution == "beta" else self._generator.random()
        return round(float(s.low + (s.high - s.low) * share), 4)

    def draw_selection(self) -> str | None:
        """The next selection's name; None, with nothing drawn, where the settings name none."""
        names = self.settings.selections
        return names[self._generator.integers(len(names))] if names else None

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here; JSON."""
        return {"settings": _plain(self.settings), "generator": self._generator.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the stream that `state` was taken of.

        Raises:
            ConfigError: It was drawn with other settings.
        """
        if state["settings"] != _plain(self.settings):
            raise ConfigError(
                f"The checkpoint was trained with rates {state['settings']}, this run asks for "
                f"{_plain(self.settings)}. Resume with the same, or start anew from the checkpoint's weights."
            )
        self._generator.bit_generator.state = state["generator"]


def _plain(settings: RateSettings) -> dict[str, Any]:
    plain = {**vars(settings), "values": list(settings.values), "selections": list(settings.selections)}
    if not settings.selections:  # as in checkpoints from before there were any
        del plain["selections"]
    return plain
