# SPDX-License-Identifier: Apache-2.0
"""The files of ``configs/stream``."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from bench.common.clips import FPS
from bench.stream.scenes import SCENES
from evs_vllm.errors import EVSError


@dataclass
class Settings:
    """One file. Every key has a default.

    Attributes:
        model: as in ``configs/bench``: `family`, `tower_to_prefill`, `sizes` of the local random-weight model.
        serve: options of ``vllm serve`` for all servers.
        env: environment variables for all servers, where the caller's environment does not set them.
        frame_size: height and width of the frames, multiples of 28.
        seconds: how long a stream is.
        chunks: lengths of its chunks, in frames of which there are `FPS` a second; even.
        scenes: names in `SCENES`.
        rates: of the rows of streams.
        resend_every: the row that caches nothing is asked at every so many turns: they do not depend on each other.
        output_tokens: of every answer.
    """

    model: dict[str, Any] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    frame_size: tuple[int, int] = (224, 392)
    seconds: int = 60
    chunks: list[int] = field(default_factory=lambda: [4, 8])
    scenes: list[str] = field(default_factory=lambda: list(SCENES))
    rates: list[float] = field(default_factory=lambda: [0.75, 0.9])
    resend_every: int = 5
    output_tokens: int = 8

    def __post_init__(self) -> None:
        if unknown := [name for name in self.scenes if name not in SCENES]:
            raise EVSError(f"scenes got {', '.join(unknown)}; allowed: {', '.join(SCENES)}.")
        if any(frames % 2 or frames < 2 or self.turns(frames) < 2 for frames in self.chunks):
            raise EVSError(f"chunks got {self.chunks}; allowed: even numbers of frames, at least two chunks a stream.")

    def turns(self, frames: int) -> int:
        """How many chunks of so many frames a stream has."""
        return int(self.seconds * FPS) // frames


def load_settings(path: Path) -> Settings:
    """Reads a file.

    Raises:
        EVSError: an unknown key or a value that is not allowed.
    """
    content = yaml.safe_load(path.read_text())
    if unknown := set(content) - {item.name for item in fields(Settings)}:
        raise EVSError(f"{path}: unknown keys {sorted(unknown)}")
    return Settings(**content)
