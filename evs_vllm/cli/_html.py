# SPDX-License-Identifier: Apache-2.0
"""The contact sheet as one HTML file with a slider, which selects in the browser by the same rule (``select.js``)."""

import base64
import html
import io
import json
from decimal import Decimal
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from evs_vllm.cli._sheet import FADE, evenly, subtitle
from evs_vllm.config import EVSConfig
from evs_vllm.core.inspection import Inspection

MAX_EDGE = 640
"""Longer edge of an embedded frame, in pixels; larger ones are reduced."""


def make_html(clip: Inspection, max_units: int = 60) -> str:
    """The page. Of a clip with more than `max_units` units that many frames are shown; the rule runs over all."""
    units, rows, columns = clip.plan.grid
    shown = evenly(units, max_units)
    data = {
        "name": clip.video.name,
        "units": units,
        "rows": rows,
        "columns": columns,
        "perUnit": rows * columns,
        **evidence(clip),
        "seconds": clip.unit_seconds,
        "settings": settings(clip.config),
        "thresholdCounts": clip.selection.threshold_counts,
        "highThreshold": clip.selection.high_threshold,
        "fade": FADE,
        "tiles": [{"unit": unit, "frame": _data_uri(clip.frames[unit * clip.frames_per_unit])} for unit in shown],
    }
    height, width = clip.frames.shape[1:3]
    # "</" would end the script element that holds the JSON.
    page = {
        "@TITLE@": html.escape(f"{clip.video.name} - evs-vllm"),
        "@ABOUT@": html.escape("  ·  ".join(part for part in subtitle(clip, len(shown)) if not _moves(part))),
        "@TILE@": str(260 if width >= height else 160),
        "@SELECT@": _resource("select.js"),
        "@DATA@": json.dumps(data).replace("</", "<\\/"),
    }
    text = _resource("view.html")
    for mark, content in page.items():
        text = text.replace(mark, content)
    return text


def evidence(clip: Inspection) -> dict[str, Any]:
    """What ``select.js`` chooses from, as its ``prepare`` takes it."""
    width = clip.evidence.shape[2] if clip.evidence.ndim == 3 else None
    raw = clip.evidence.astype("<i4" if width is None else np.uint8, casting="safe").tobytes()
    return {
        "evidenceBase64": base64.b64encode(raw).decode(),
        "width": width,
        "unit": _decimal(clip.unit),
        "stockCount": clip.selection.stock_count,
        "weights": clip.weights,
    }


def settings(config: EVSConfig) -> dict[str, Any]:
    """`config` as ``selectTokens`` of ``select.js`` takes it; numbers that must stay exact are decimal texts."""
    return {
        "rate": _decimal(config.rate),
        "threshold": _decimal(config.threshold or None),
        "minPerUnit": config.min_tokens_per_unit,
        "maxTokens": config.max_tokens,
    }


def _decimal(number: float | None) -> str | None:
    return None if number is None else format(Decimal(repr(number)), "f")


def _moves(part: str) -> bool:
    return part.startswith(("rate ", "threshold ", "at most ", "off"))


def _data_uri(frame: np.ndarray) -> str:
    picture = Image.fromarray(frame)
    picture.thumbnail((MAX_EDGE, MAX_EDGE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _resource(name: str) -> str:
    return files("evs_vllm.cli").joinpath(name).read_text(encoding="utf-8")
