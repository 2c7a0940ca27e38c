# SPDX-License-Identifier: Apache-2.0
"""The contact sheet of a clip: its frames with the dropped patches faded, and a strip of kept tokens per unit."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evs_vllm.core.inspection import Inspection
from evs_vllm.text import percent

PAPER, INK, MUTED, TRACK, ACCENT = "#ffffff", "#1f2328", "#6e7781", "#e7eaee", "#0b7285"
FADE = 0.72
"""How far a dropped patch, grey already, is faded into the paper."""

WIDTH, MARGIN, GAP, LABEL, STRIP = 1680, 48, 20, 34, 150
ASPECT = 2.4
"""The grid of frames is made about this much wider than high."""


def draw_sheet(clip: Inspection, max_units: int = 40) -> Image.Image:
    """Draws a clip.

    Args:
        clip: The clip with its plan.
        max_units: How many units are drawn of a clip that has more, evenly spaced; the strip shows all.
    """
    shown = evenly(clip.plan.num_units, max_units)
    height, width = clip.frames.shape[1:3]
    columns = grid_columns(len(shown), width / height)
    tile_width = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns, 4 * width)
    tile_height = round(tile_width * height / width)
    rows = math.ceil(len(shown) / columns)
    top = MARGIN + 96
    strip_top = top + rows * (tile_height + LABEL + GAP // 2) + 44
    sheet = Image.new("RGB", (WIDTH, strip_top + STRIP + 44 + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), headline(clip), INK, font(32))
    draw.text((MARGIN, MARGIN + 40), "  ·  ".join(subtitle(clip, len(shown))), MUTED, font(18))
    for place, unit in enumerate(shown):
        x = MARGIN + place % columns * (tile_width + GAP)
        y = top + place // columns * (tile_height + LABEL + GAP // 2)
        draw.rectangle((x - 1, y - 1, x + tile_width, y + tile_height), outline=TRACK)  # bright frames have no edge
        sheet.paste(draw_tile(clip, unit, (tile_width, tile_height)), (x, y))
        kept = f"{clip.plan.counts[unit]} / {clip.plan.tokens_per_unit}"
        draw.text((x, y + tile_height + 6), unit_label(clip, unit, long=tile_width >= 200), INK, font(17))
        draw.text((x + tile_width, y + tile_height + 6), kept, ACCENT, font(17), anchor="ra")
    _draw_strip(draw, clip, strip_top)
    return sheet


def draw_tile(clip: Inspection, unit: int, size: tuple[int, int]) -> Image.Image:
    """One unit's first frame at `size` (width, height): kept patches as they are, dropped ones grey and faded."""
    colour = Image.fromarray(clip.frames[unit * clip.frames_per_unit]).resize(size, Image.Resampling.LANCZOS)
    faded = Image.blend(colour.convert("L").convert("RGB"), Image.new("RGB", size, PAPER), FADE)
    return Image.composite(colour, faded, tile_mask(clip.plan.mask[unit], size))


def tile_mask(kept: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """(H, W) bool as a black and white picture of `size` (width, height)."""
    return Image.fromarray(np.where(kept, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def evenly(total: int, most: int) -> list[int]:
    """At most `most` of 0..total-1, evenly spaced, the first and the last among them."""
    if total <= most:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(most - 1, 1)) for i in range(most)})


def grid_columns(tiles: int, tile_aspect: float) -> int:
    """A number of columns that makes a pleasant sheet: near `ASPECT`, few empty places, tiles neither tiny nor huge."""

    def cost(columns: int) -> float:
        rows = math.ceil(tiles / columns)
        shape = abs(math.log(columns * tile_aspect / rows / ASPECT))
        return shape + 0.8 * (rows * columns - tiles) / (rows * columns)

    return min(range(min(tiles, 3), min(tiles, 10) + 1), key=cost)


def headline(clip: Inspection) -> str:
    """The numbers; the font that comes with Pillow has letters, not arrows."""
    kept, total = clip.plan.num_kept, clip.plan.num_tokens
    return f"{clip.video.name}: {kept} of {total} video tokens kept, {percent(clip.dropped_share)} dropped"


def subtitle(clip: Inspection, num_shown: int) -> list[str]:
    (units, rows, columns), (_, height, width, _) = clip.plan.grid, clip.frames.shape
    parts = [
        clip.family,
        _setting(clip),
        f"selection {clip.selection.name}",
        f"{units} units of {rows} x {columns} tokens, {width} x {height} pixels",
    ]
    if clip.frames_per_unit > 1:
        parts.append(f"first of each unit's {clip.frames_per_unit} frames")
    if num_shown < units:
        parts.append(f"{num_shown} of {units} units drawn, all in the strip")
    return parts


def unit_label(clip: Inspection, unit: int, long: bool = True) -> str:
    name = f"unit {unit}" if long else str(unit)
    return name if clip.unit_seconds is None else f"{name}  ·  {clip.unit_seconds[unit]:.1f} s"


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _setting(clip: Inspection) -> str:
    config = clip.config
    if config.threshold:
        return f"threshold {config.threshold:g}"
    return f"rate {config.rate:g}" if config.rate else f"at most {config.max_tokens}" if config.max_tokens else "off"


def _draw_strip(draw: ImageDraw.ImageDraw, clip: Inspection, top: int) -> None:
    """Kept tokens of every unit as bars, on bars of all its tokens."""
    counts, full = clip.plan.counts, clip.plan.tokens_per_unit
    left, right, bottom = MARGIN + 44, WIDTH - MARGIN, top + STRIP
    draw.text((MARGIN, top - 32), "kept tokens per unit", INK, font(18))
    edges = np.linspace(left, right, len(counts) + 1)
    spacing = min(6.0, 0.25 * (edges[1] - edges[0]))
    for start, stop, count in zip(edges[:-1], edges[1:], counts):
        box = (start + spacing / 2, stop - spacing / 2)
        draw.rectangle((box[0], top, max(box), bottom), TRACK)
        if count:
            draw.rectangle((box[0], bottom - max(2, STRIP * count / full), max(box), bottom), ACCENT)
    for value, y in ((full, top), (0, bottom)):
        draw.text((left - 10, y), str(value), MUTED, font(15), anchor="rm")
    for unit in tick_units(len(counts), 16):
        where = (edges[unit] + edges[unit + 1]) / 2
        text = str(unit) if clip.unit_seconds is None else f"{clip.unit_seconds[unit]:.1f} s"
        draw.text((where, bottom + 10), text, MUTED, font(15), anchor="ma")


def tick_units(total: int, most: int) -> Sequence[int]:
    """Units to label: every 1st, 2nd, 5th, 10th..., at most `most`."""
    for step in (s * 10**e for e in range(7) for s in (1, 2, 5)):
        if math.ceil(total / step) <= most:
            return range(0, total, step)
    return range(1)
