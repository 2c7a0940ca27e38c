# SPDX-License-Identifier: Apache-2.0
"""The files of ``configs/bench``: what a run measures, with which model, on which servers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from bench.serve.measurements import Cell
from bench.serve.pool import ROWS
from evs_vllm.errors import EVSError

# Wall time of vanilla vLLM's vision tower over that of its language prefill, for each tower layer of the default
# sizes: 32 frames of 231 tokens a unit, 2 cores, fp32. Every run measures the true ratio and writes it down.
RATIO_PER_TOWER_LAYER = 0.11

SIZES = {
    "hidden_size": 768,
    "layers": 12,
    "heads": 12,
    "kv_heads": 2,
    "vision_hidden": 384,
    "max_tokens_per_frame": 240,
}


@dataclass
class Settings:
    """One file. Every key has a default.

    Attributes:
        model: `family`, `tower_to_prefill` (the cost ratio to imitate) and `sizes` of the local random-weight model.
        serve: options of ``vllm serve`` for all servers.
        env: environment variables for all servers, where the caller's environment does not set them.
        max_servers: alive at a time.
        rows: what is compared; "vanilla" is always among them.
        repeats: turns of each row in each cell.
        output_tokens: of every answer.
        frame_size: height and width of cuts of real clips.
        drawn_size: height and width of drawn clips; multiples of 28, so that no resizing blurs what moves.
        base: the cell that sweeps vary.
        sweeps: by name: `axis` (a field of the cell), its `values`, and overrides: of the base, `rows`, and `requests`
            as a list beside `values`.
        caches: the run with caches on: `frames`, `clips`, `rows`; empty is no such run.
        stages: the run with instrumented servers: `frames` (a list), `rows`, `repeats`; empty is no such run.
    """

    model: dict[str, Any] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    max_servers: int = 3
    rows: list[str] = field(default_factory=lambda: ["vanilla", "stock", "evs-full", "evs-reuse"])
    repeats: int = 3
    output_tokens: int = 8
    frame_size: tuple[int, int] = (336, 640)
    drawn_size: tuple[int, int] = (308, 588)
    base: dict[str, Any] = field(default_factory=dict)
    sweeps: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cells()
        for part in (self.caches, self.stages):
            if part:
                part["rows"] = list(dict.fromkeys(["vanilla", *part.get("rows", self.rows)]))
                _check_rows(part["rows"])
        if self.repeats < 1:
            raise EVSError("repeats: at least 1")

    def cells(self) -> dict[Cell, dict[str, list[str]]]:
        """The cells to measure, each once, with the rows and the sweeps that it belongs to."""
        found: dict[Cell, dict[str, list[str]]] = {}
        for name, sweep in self.sweeps.items():
            rest = {key: value for key, value in sweep.items() if key not in ("axis", "values", "rows", "requests")}
            rows = list(dict.fromkeys(["vanilla", *sweep.get("rows", self.rows)]))
            _check_rows(rows)
            for index, value in enumerate(sweep["values"]):
                requests = sweep.get("requests", self.base.get("requests", 1))
                count = requests[index] if isinstance(requests, list) else requests
                cell = Cell(**{**self.base, **rest, sweep["axis"]: value, "requests": count})
                entry = found.setdefault(cell, {"rows": [], "sweeps": []})
                entry["rows"] += [row for row in rows if row not in entry["rows"]]
                entry["sweeps"].append(name)
        return found


def load_settings(path: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Reads a file.

    Raises:
        EVSError: an unknown key or row.
    """
    content = yaml.safe_load(path.read_text()) | dict(overrides or {})
    if unknown := set(content) - {item.name for item in fields(Settings)}:
        raise EVSError(f"{path}: unknown keys {sorted(unknown)}")
    try:
        return Settings(**content)
    except TypeError as error:
        raise EVSError(f"{path}: {error}") from None


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain data."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return content


def local_model(model: Mapping[str, Any]) -> Path:
    """A random-weight model with the cost ratio that the settings ask for, made on first use."""
    from evs_vllm.testing import cached_model

    sizes = SIZES | dict(model.get("sizes", {}))
    sizes.setdefault("vision_layers", max(2, round(model.get("tower_to_prefill", 0.66) / RATIO_PER_TOWER_LAYER)))
    return cached_model(model.get("family", "qwen2_5_vl"), **sizes)


def _check_rows(rows: list[str]) -> None:
    if unknown := set(rows) - set(ROWS):
        raise EVSError(f"unknown rows {sorted(unknown)}; allowed: {', '.join(ROWS)}")
