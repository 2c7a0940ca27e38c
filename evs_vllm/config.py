# SPDX-License-Identifier: Apache-2.0
"""Checked settings of a server or a request: `EVSConfig`, whose fields are the rows of `evs_vllm.options.OPTIONS`.

This module imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evs_vllm.errors import ConfigError
from evs_vllm.options import OPTIONS, SELECTION_NAMES, Option, exact

IDENTITY_VERSION = "evs7"
"""Bump it when what a plan holds or how tokens are counted changes: no cache may serve what an older version made."""

_KEPT_BY = ("rate", "threshold", "selection", "budget", "min_tokens_per_unit", "max_tokens")

_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class EVSConfig:
    """Checked settings of a server or, after `evs_vllm.requests.admit`, of one request. See `OPTIONS` for the meaning.

    Raises:
        ConfigError: A value is not allowed, or `rate` and `threshold` contradict each other.
    """

    rate: float | None = None
    threshold: float | None = None
    selection: str = SELECTION_NAMES[0]
    budget: str = "clip"
    focus: tuple[tuple[float, float, float], ...] | None = None
    positions: str = "keep"
    min_tokens_per_unit: int = 0
    max_tokens: int | None = None
    encoder: str = "auto"
    encoder_refresh: float = 25
    request_overrides: str = "stricter"
    stream: bool = False
    stream_cache_gb: float = 0.25
    processor_threads: int | None = None
    why_not_reuse: str = ""
    """Not an option: why this server cannot run the encoder 'reuse', or "". Set at start-up by `resolve_encoder`."""

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is not None or not option.nullable:
                option.check(value)
        if self.focus is not None:
            # Of JSON, lists; settings are compared and hashed.
            object.__setattr__(self, "focus", tuple(tuple(one) for one in self.focus))
        if self.focus and self.threshold:
            raise ConfigError(
                f"focus and threshold={self.threshold} contradict each other: a focus moves a fixed number of tokens "
                "to where it looks, and a threshold fixes none. Set rate or max_tokens instead of the threshold."
            )
        if self.budget == "causal" and self.max_tokens and not self.rate and not self.threshold:
            raise ConfigError(
                f"budget=causal and max_tokens={self.max_tokens} alone contradict each other: the first units would "
                "have all of the tokens, and what came later none. Set a rate or a threshold beside them."
            )
        if self.focus and self.stream:
            raise ConfigError(
                "focus and stream contradict each other: a focus counts the seconds of a video, and each video of a "
                "stream begins at 0. Leave one of them out."
            )
        if self.rate and self.threshold:
            raise ConfigError(
                f"rate={self.rate} and threshold={self.threshold} contradict each other: a rate fixes how many tokens "
                "stay, a threshold lets the content decide. Set one; max_tokens can cap a threshold."
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "EVSConfig":
        """Builds a config from ``additional_config["evs"]`` or the command line.

        Raises:
            ConfigError: `options` is no mapping, has an unknown key or a value that is not allowed.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"The evs options must be a mapping such as {{'rate': 0.75}}, got {options!r}.")
        unknown = sorted(str(key) for key in options if key not in _BY_NAME)
        if unknown:
            raise ConfigError(f"Unknown evs option(s) {', '.join(unknown)}; known: {', '.join(_BY_NAME)}.")
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`."""
        return {option.name: getattr(self, option.name) for option in OPTIONS}

    def resolve_encoder(self, why_not: str) -> "EVSConfig":
        """The settings of a server that can run the encoder 'reuse' unless `why_not` says why it cannot.

        Raises:
            ConfigError: 'reuse' was asked for and is not possible.
        """
        if self.encoder == "reuse" and why_not:
            raise ConfigError(f"--evs-encoder reuse is not possible here: {why_not} Use 'full' or 'auto'.")
        encoder = self.encoder if self.encoder != "auto" else "full" if why_not else "reuse"
        return replace(self, encoder=encoder, why_not_reuse=why_not)

    @property
    def active(self) -> bool:
        """Whether these settings can drop a token of some clip."""
        return bool(self.rate or self.threshold or self.max_tokens)

    @property
    def identity(self) -> str:
        """What of these settings shapes a clip's prompt and embeddings; equal settings have equal identities.

        It is mixed into the multimodal cache keys.
        """
        if not self.active:
            return ""
        shaping = (f"{o.name}={spelled(getattr(self, o.name))}" for o in OPTIONS if o.affects and self._counts(o))
        return " ".join((IDENTITY_VERSION, *shaping))

    def _counts(self, option: Option) -> bool:
        """Whether an option changes anything beside the others."""
        return option.affects != "reuse" or self.encoder == "reuse"

    def describe(self) -> str:
        """One sentence fragment for the start-up line."""
        if not self.active:
            return "nothing by default"
        what = []
        if self.rate:
            what.append(f"{100 * self.rate:g} % of the video tokens of each clip")
        elif self.threshold:
            what.append(f"video tokens that changed by less than {self.threshold:g}")
        if self.max_tokens:
            what.append(f"what exceeds {self.max_tokens} tokens per clip")
        if self.budget == "causal":
            what[-1] += " by what it showed so far"
        if self.stream:
            what[-1] += ", the videos of a request being one stream"
        kept = f", at least {self.min_tokens_per_unit} per unit kept" if self.min_tokens_per_unit else ""
        encoder = "" if self.encoder == "auto" else f", {self.encoder} encoder"
        return f"{' and '.join(what)}{kept} (selection {self.selection}, {self.positions} positions{encoder})"

    def is_at_most(self, other: "EVSConfig") -> bool:
        """Whether for every clip these settings keep and compute at most as many tokens as `other` does."""
        if not other.active or not self.active:
            return not other.active
        if self.selection != other.selection and (self.threshold or other.threshold):
            return False  # thresholds of two selections have nothing in common
        if other.threshold and self.threshold != other.threshold and self.selection != "paper":
            # Compared with the last kept token, not every clip keeps fewer at a higher threshold: 0 4 6 1 6 1 keeps one
            # more at 4, four more at 5.
            return False
        if other.threshold and self.stream != other.stream and self.selection != "paper":
            return False  # for the same reason
        if (other.stream or other.budget == "causal") and any(
            getattr(self, name) != getattr(other, name) for name in _KEPT_BY
        ):
            # What is kept depends on what was kept before: who kept less then may lack more now.
            return False
        return all(
            option.no_more(getattr(self, option.name), getattr(other, option.name))
            for option in OPTIONS
            if option.no_more is not None and other._counts(option)
        )


def spelled(value: object) -> str:
    """One spelling for all values that mean the same: 0.50 and 0.5, 0 and not set."""
    if isinstance(value, tuple):
        return f"[{','.join(map(spelled, value))}]"
    return str(exact(value) if isinstance(value, float) else value or 0)
