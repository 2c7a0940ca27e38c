# SPDX-License-Identifier: Apache-2.0
"""The contact sheet: what is kept is untouched, what is dropped is grey and pale, everything fits."""

import numpy as np
import pytest
from PIL import Image

from evs_vllm.cli import _sheet
from evs_vllm.cli.view import write_view
from evs_vllm.core.scorers import SELECTIONS
from tests.cli.clips import TOKEN, inspected


def test_kept_patches_are_untouched_and_dropped_ones_pale_and_grey():
    clip = inspected()
    height, width = clip.frames.shape[1:3]
    for unit in range(clip.plan.num_units):
        tile = np.asarray(_sheet.draw_tile(clip, unit, (width, height))).astype(int)
        kept = np.kron(clip.plan.mask[unit], np.ones((TOKEN, TOKEN))).astype(bool)
        frame = clip.frames[2 * unit].astype(int)
        assert (tile[kept] == frame[kept]).all()
        dropped = tile[~kept]
        assert (dropped == dropped[:, :1]).all()
        assert (dropped.min() if dropped.size else 255) >= 255 * _sheet.FADE - 2
    assert 0 < clip.plan.counts[1:].sum() < clip.plan.num_tokens - clip.plan.tokens_per_unit


def test_the_sheet_holds_the_tiles_and_the_strip(tmp_path):
    clip = inspected(units=7)
    assert "drawn & <cut>.mp4: 42 of 105 video tokens kept, 60.0 % dropped" in write_view(clip, tmp_path / "out.png")
    sheet = Image.open(tmp_path / "out.png")
    pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == _sheet.WIDTH
    accent = (pixels == np.array(Image.new("RGB", (1, 1), _sheet.ACCENT))[0, 0]).all(axis=2)
    assert accent[-200:].sum() > 20 * accent[:-300].sum() > 0  # bars below, a few figures above


@pytest.mark.parametrize("options", [{"rate": 0.9}, {"threshold": 5}, {"max_tokens": 20}, {"rate": 0}])
@pytest.mark.parametrize("units", [1, 2, 7, 90])
def test_any_length_and_setting_can_be_drawn(units, options):
    clip = inspected(units, size=(56, 84), seconds=units != 7, **options)
    sheet = _sheet.draw_sheet(clip)
    assert sheet.width == _sheet.WIDTH and 300 < sheet.height < 3000
    drawn = [part for part in _sheet.subtitle(clip, len(_sheet.evenly(units, 40))) if "drawn" in part]
    assert drawn == (["40 of 90 units drawn, all in the strip"] if units == 90 else [])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_sheet_names_the_selection(selection):
    assert f"selection {selection}" in _sheet.subtitle(inspected(selection=selection, rate=0.5), 6)


def test_tall_frames_are_drawn():
    assert _sheet.draw_sheet(inspected(5, size=(280, 56))).width == _sheet.WIDTH


@pytest.mark.parametrize(("total", "most"), [(1, 40), (40, 40), (41, 40), (1000, 40), (3, 1)])
def test_evenly(total, most):
    shown = _sheet.evenly(total, most)
    assert len(shown) == min(total, most) and shown == sorted(set(shown)) and shown[0] == 0
    assert most == 1 or shown[-1] == total - 1
    assert np.diff(shown).max(initial=1) - np.diff(shown).min(initial=10**6) <= 1


@pytest.mark.parametrize("total", [1, 16, 17, 100, 12345])
def test_tick_units(total):
    assert 1 <= len(_sheet.tick_units(total, 16)) <= 16
