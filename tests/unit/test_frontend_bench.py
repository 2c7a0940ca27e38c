# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the front end: what it times, what it checks, what it writes."""

import json
import time

import pytest
import torch

from bench.common.clips import ClipSpec
from bench.frontend.stages import STAGES, Clock

pytestmark = pytest.mark.vllm


def test_what_is_within_a_part_is_taken_off_it() -> None:
    clock = Clock()
    wait = clock.wrapped("inner", lambda: time.sleep(0.02))
    with clock.of("outer"):
        wait()
        time.sleep(0.01)
        wait()
    assert 40 <= clock.spent["inner"][0] < 200 and 10 <= clock.spent["outer"][0] < 100


def test_a_small_clip(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from bench.frontend import __main__ as bench

    processors = bench.make_processors(tmp_path, "qwen2_5_vl")
    cell = bench.measure(processors, ClipSpec(0, 6, 100, 150), 1)
    text = bench.report([cell])
    for row in bench.ROWS:
        times = cell.samples[row]
        assert all(spent.wall >= 0 for (spent,) in times.values()) and times.keys() == {*STAGES, "total"}
        made_here = row != "stock"
        assert (times["cells"][0].wall > 0) == (times["rows"][0].wall > 0) == made_here, row
        assert f" {row} |" in text
    assert cell.copies.keys() == {"source", *bench.ROWS} and "| a copy of the pixels |" in text
    assert cell.sizes["0.5"] < cell.sizes["all, full"] == cell.sizes["stock"]

    clip = torch.randint(256, (6, 100, 150, 3), dtype=torch.uint8).numpy()
    stock, fields = (bench.fields_of(processors[row], clip) for row in ("stock", "0.5"))
    bench.check(stock, fields)
    fields["pixel_values_videos"][3, 5] += 1
    with pytest.raises(ValueError, match="pixel_values_videos"):
        bench.check(stock, fields)


def test_the_renderer_takes_clips_of_every_source() -> None:
    from bench.frontend import renderer

    cells = renderer.measure("qwen2_5_vl", 64, frames=6, size=(100, 150), count=2, repeats=1)
    assert [(cell["source"], cell["row"]) for cell in cells] == [
        (source, row) for source in renderer.SOURCES for row in renderer.ROWS
    ]
    for stock, own in zip(cells[::2], cells[1::2], strict=True):
        assert own["bytes"] <= stock["bytes"] and len(stock["seconds"]) == len(own["cpu"]) == 1
    assert cells[1]["bytes"] < cells[0]["bytes"]
    text = renderer.report({1: cells})
    assert text.count("| 1 |") == len(renderer.SOURCES)


def test_the_estimate_is_what_the_documentation_says() -> None:
    from bench.common.harness import ROOT
    from bench.frontend import estimate

    content = json.loads((ROOT / "bench/results/frontend/frontend.json").read_text())
    table = [line for line in estimate.report(content).splitlines() if line.startswith("|")]
    text = (ROOT / "docs/measured.md").read_text()
    assert "\n".join(table) in text
    vanilla, _, now = estimate.estimates(2.0)
    assert now.processor == vanilla.processor / 2 and now.total(60) < vanilla.total(60)
