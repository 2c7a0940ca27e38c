# SPDX-License-Identifier: Apache-2.0
"""The page with the slider: self-contained, and its rule is the rule, run by node against the Python one."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
import torch

from evs_vllm.cli._html import evidence, make_html, settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.descriptors import Descriptor
from evs_vllm.core.scorers import SELECTIONS, Anchored
from evs_vllm.core.selection import make_plan
from tests.cli.clips import inspected, inspection_of

SCRIPT = files("evs_vllm.cli").joinpath("select.js")
RATES = [0, 1e-9, 0.01, 0.07, 0.29, 0.3, 0.5, 0.57, 0.58, 0.75, 0.9, 0.95, 0.999999]
CONFIGS = [
    *({"rate": rate} for rate in RATES if rate),
    *({"rate": rate, "min_tokens_per_unit": least} for rate in (0.5, 0.9) for least in (1, 3)),
    {"rate": 0.3, "max_tokens": 40},
    {"rate": 0.9, "max_tokens": 60, "min_tokens_per_unit": 2},
    {"max_tokens": 31},
    {"max_tokens": 1, "min_tokens_per_unit": 100},
    *({"threshold": t} for t in (0.1, 0.3, 1, 2, 2.5, 17, 60.3, 255)),
    *({"threshold": t, "max_tokens": most} for t in (0.3, 2, 30) for most in (1, 45, 200)),
    *({"threshold": t, "min_tokens_per_unit": 2, "max_tokens": 200} for t in (2, 40)),
    {"threshold": 25, "min_tokens_per_unit": 3},
]


class Handed(Descriptor):
    """Describes a clip by numbers that are handed in."""

    name, unit, counts = "handed", 0.7, "steps"

    def __init__(self, descriptors):
        self.descriptors = torch.from_numpy(descriptors)

    def make(self, clip):
        return self.descriptors


def run_rule(runs):
    """Kept flat indices by ``select.js``, one list for each (clip of the page, its settings)."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    code = (
        "const {prepare, selectTokens} = require(process.argv[1]);"
        "const runs = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "const indices = (kept) => [...kept.keys()].filter((i) => kept[i]);"
        "const kept = runs.map(([clip, all]) => [prepare(clip), all.map((s) => indices(selectTokens(clip, s)))][1]);"
        "console.log(JSON.stringify(kept));"
    )
    done = subprocess.run(
        [node, "-e", code, str(SCRIPT)], input=json.dumps(runs), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def page_clip(clip, selection):
    """The part of the page's data that the rule reads."""
    frames = np.zeros((clip.num_units, 8, 8, 3), np.uint8)
    chosen_from = evidence(inspection_of(clip, frames, EVSConfig(), selection))
    return chosen_from | {"units": clip.num_units, "perUnit": clip.tokens_per_unit}


def drifting(rng, shape, levels):
    """(T, P, n) uint8 of a few grey levels: places stand still, flicker by one level, or turn into something else."""
    units, per_unit, values = shape
    clip = rng.integers(0, levels, shape)
    for unit in range(1, units):
        stays = rng.random((per_unit, 1)) < 0.7
        flicker = rng.integers(-1, 2, (per_unit, values)) * (rng.random((per_unit, 1)) < 0.5)
        clip[unit] = np.where(stays, clip[unit - 1] + flicker, clip[unit])
    return clip.clip(0, levels - 1).astype(np.uint8)


def assert_same(clip, selections):
    """The browser's choice is the server's for all of `CONFIGS`."""
    configs = [EVSConfig(**options) for options in CONFIGS]
    runs = [(page_clip(clip, selection), [settings(config) for config in configs]) for selection in selections]
    for selection, kept_by_all in zip(selections, run_rule(runs), strict=True):
        for config, kept in zip(configs, kept_by_all, strict=True):
            assert kept == make_plan(clip, config, selection).kept.tolist(), (selection.name, config)


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (3, 7), (6, 10), (9, 17), (33, 3), (34, 5), (71, 6)], ids=str)
@pytest.mark.parametrize("levels", [1, 3, 256], ids=lambda n: f"{n}levels")
def test_the_browser_keeps_what_the_server_keeps(shape, levels):
    """Few grey levels make many ties; 1 level makes everything equal. Blocks of select_hold have 32 units."""
    rng = np.random.default_rng()
    tokens = torch.from_numpy(drifting(rng, (*shape, 3 * 4 * 4), levels))
    clip = Clip(tokens, (*shape, 1), TokenPixels(1, 3, 1, 4))
    width = int(rng.integers(1, 9))
    handed = Anchored(Handed(drifting(rng, (*shape, width), levels)), high_threshold=100)
    assert_same(clip, [*SELECTIONS.values(), handed])


def test_rates_are_exact_in_the_browser():
    """0.9 of 100 leaves 10, 0.57 of 100 leaves 43: in binary fractions it would be 9 and 43."""
    tokens = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 1, 48).contiguous()
    clip = Clip(tokens, (100, 1, 1), TokenPixels(1, 3, 1, 4))
    for selection in SELECTIONS.values():
        all_settings = [settings(EVSConfig(rate=rate)) for rate in RATES]
        (kept,) = run_rule([(page_clip(clip, selection), all_settings)])
        # One token is the whole of unit 0: but for "paper", half of the share of the others rounds up to one more.
        last = 1 if selection.stock_count else 2
        assert [len(k) for k in kept] == [100, 99, 99, 93, 71, 70, 50, 43, 42, 25, 10, 5, last]


@pytest.mark.parametrize("shape", [(2, 3), (9, 17), (40, 5)], ids=str)
def test_a_focus_in_the_browser(shape):
    rng = np.random.default_rng()
    tokens = torch.from_numpy(drifting(rng, (*shape, 3 * 4 * 4), 256))
    clip = Clip(tokens, (*shape, 1), TokenPixels(1, 3, 1, 4), starts=tuple(float(unit) for unit in range(shape[0])))
    for focus in (((shape[0] / 2, shape[0], 9.4),), ((0, 2, 0), (1, 3, 64))):
        config = EVSConfig(rate=0.7, focus=focus)
        for selection in SELECTIONS.values():
            inspection = inspection_of(clip, np.zeros((shape[0], 8, 8, 3), np.uint8), config, selection)
            page = evidence(inspection) | {"units": shape[0], "perUnit": shape[1]}
            assert page["weights"] is not None
            assert run_rule([(page, [settings(config)])]) == [[make_plan(clip, config, selection).kept.tolist()]]


class Links(HTMLParser):
    """Collects everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_self_contained():
    clip = inspected(units=70)
    page = make_html(clip, max_units=8)
    parser = Links()
    parser.feed(page)
    assert parser.found == [] and parser.scripts == 3
    assert not re.search(r"https?://|url\(|@import|@[A-Z]+@", page)
    assert "<title>drawn &amp; &lt;cut&gt;.mp4" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["tiles"]) == 8 and all(t["frame"].startswith("data:image/jpeg;base64,") for t in data["tiles"])
    described = np.frombuffer(base64.b64decode(data["evidenceBase64"]), np.uint8)
    assert (described.reshape(clip.evidence.shape) == clip.evidence).all() and data["width"] == clip.evidence.shape[2]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_data_of_the_page_gives_the_plan(selection):
    clip = inspected(rate=0.7, min_tokens_per_unit=1, selection=selection)
    page = make_html(clip)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert run_rule([(data, [data["settings"]])]) == [[clip.plan.kept.tolist()]]
    assert f"selection {selection}" in re.search(r'<p class="about">(.*?)</p>', page)[1]
    assert data["thresholdCounts"] == SELECTIONS[selection].threshold_counts
