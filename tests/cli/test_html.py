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

from evs_vllm.cli._html import make_html, settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.selection import make_plan
from tests.cli.clips import inspected

SCRIPT = files("evs_vllm.cli").joinpath("select.js")
RATES = [0, 1e-9, 0.01, 0.07, 0.29, 0.3, 0.5, 0.57, 0.58, 0.75, 0.9, 0.95, 0.999999]
CONFIGS = [
    *({"rate": rate} for rate in RATES if rate),
    *({"rate": rate, "min_tokens_per_unit": 3} for rate in (0.5, 0.9)),
    {"rate": 0.3, "max_tokens": 40},
    {"max_tokens": 31},
    {"max_tokens": 1, "min_tokens_per_unit": 100},
    *({"threshold": t} for t in (0.1, 0.3, 1, 2, 2.5, 255)),
    {"threshold": 2, "max_tokens": 45},
    {"threshold": 2, "min_tokens_per_unit": 2, "max_tokens": 200},
]


def run_rule(clip, all_settings):
    """Kept flat indices by ``select.js``, one list per settings."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    code = (
        "const {rank, selectTokens} = require(process.argv[1]);"
        "const {clip, all} = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "clip.scores = Int32Array.from(clip.scores); clip.order = rank(clip.scores);"
        "const kept = all.map((s) => [...selectTokens(clip, s).keys()].filter((i) => selectTokens(clip, s)[i]));"
        "console.log(JSON.stringify(kept));"
    )
    text = json.dumps({"clip": clip, "all": all_settings})
    done = subprocess.run([node, "-e", code, str(SCRIPT)], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (6, 10), (9, 17)], ids=str)
@pytest.mark.parametrize("levels", [1, 3, 256], ids=lambda n: f"{n}levels")
def test_the_browser_keeps_what_the_server_keeps(shape, levels):
    """Few grey levels make many ties; 1 level makes all scores 0."""
    units, per_unit, values = *shape, 4
    rng = np.random.default_rng(units * levels)
    tokens = torch.from_numpy(rng.integers(0, levels, (units, per_unit, values), dtype=np.uint8))
    scores = np.abs(np.diff(tokens.numpy().astype(int), axis=0, prepend=tokens[:1].numpy().astype(int))).sum(axis=2)
    clip = {"scores": scores.flatten().tolist(), "units": units, "perUnit": per_unit, "values": values}
    configs = [EVSConfig(**options) for options in CONFIGS]
    for config, kept in zip(configs, run_rule(clip, [settings(config) for config in configs]), strict=True):
        assert kept == make_plan(Clip(tokens, (units, per_unit, 1)), config).kept.tolist(), config


def test_rates_are_exact_in_the_browser():
    """0.9 of 100 leaves 10, 0.57 of 100 leaves 43: in binary fractions it would be 9 and 43."""
    clip = {"scores": list(range(100)), "units": 100, "perUnit": 1, "values": 1}
    kept = run_rule(clip, [settings(EVSConfig(rate=rate)) for rate in RATES])
    assert [len(k) for k in kept] == [100, 99, 99, 93, 71, 70, 50, 43, 42, 25, 10, 5, 1]


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
    scores = np.frombuffer(base64.b64decode(data["scoresBase64"]), "<i4")
    assert (scores.reshape(clip.scores.shape) == clip.scores).all()


def test_the_data_of_the_page_gives_the_plan():
    clip = inspected(rate=0.7, min_tokens_per_unit=1)
    page = make_html(clip)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    data["scores"] = clip.scores.flatten().tolist()
    assert run_rule(data, [data["settings"]]) == [clip.plan.kept.tolist()]
