# SPDX-License-Identifier: Apache-2.0
"""Each deployment answers as one process does. `make test-deploy` runs all of them; by default the cheapest runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evs_vllm.serving.topologies import TOPOLOGIES
from tests.deploy.deployments import DEPLOYMENTS, one_process
from tests.deploy.questions import Said, answers, compare, conversation, questions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/deploy/topologies.md"
CHEAP = ("api_servers",)
FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Path:
    return model_dir(FAMILY)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Said]]:
    """The answers of one process, which is gone when others start."""
    with one_process(model, tmp_path_factory.mktemp("one_process")) as server:
        said = answers(server.post, {**questions(), **conversation()})
    prompts = {name: len(answer.prompt) for name, answer in said.items()}
    # Six units of 12 tokens, unit 0 whole.
    assert prompts["nothing dropped"] - prompts["the server's settings"] >= 36, prompts
    yield said


@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in CHEAP else pytest.mark.deploy) for each in DEPLOYMENTS]
)
def test_answers_are_those_of_one_process(
    name: str, model: Path, reference: dict[str, Said], tmp_path: Path, record_property: Any
) -> None:
    record_property("topology", name)
    count, worst = 0, 0.0
    with DEPLOYMENTS[name](model, tmp_path) as deployment:
        # In the order of the reference, then mixed, so that processes meet what they have not seen themselves.
        rounds = [{**questions(), **conversation()}]
        rounds += [dict(reversed(rounds[0].items()))] * (2 if deployment.at_once > 1 else 1)
        for requests in rounds:
            worst = max(worst, compare(answers(deployment.ask, requests, deployment.at_once), reference))
            count += len(requests)
        deployment.evidence()
    record_property("compared", f"{count} answers, largest difference of a logprob {worst:.1e}")


def test_a_wrong_answer_is_noticed() -> None:
    """The comparison itself: another prompt, other tokens, another logprob, a near tie."""
    right = Said((1, 2, 3), (4, 5), ({4: -0.1, 9: -2.0}, {5: -0.2, 9: -2.0}))
    assert compare({"a": right}, {"a": right}) == 0.0
    for wrong in (
        dataclasses.replace(right, prompt=(1, 3)),
        dataclasses.replace(right, tokens=(4, 9)),
        dataclasses.replace(right, logprobs=({4: -0.1, 9: -2.0}, {5: -0.201, 9: -2.0})),
        dataclasses.replace(right, logprobs=right.logprobs[:1]),
    ):
        with pytest.raises((AssertionError, ValueError)):
            compare({"a": wrong}, {"a": right})
    tied = dataclasses.replace(right, logprobs=({4: -0.1, 9: -2.0}, {5: -0.2, 9: -0.2001}))
    with pytest.raises(AssertionError, match="nearly tied"):
        compare({"a": tied}, {"a": tied})


def test_every_row_of_the_table_is_tested() -> None:
    """What the documentation says was run has a test of that name, and passed when the results were written."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    result = {cells[1]: cells[3] for line in RESULTS.read_text().splitlines() if len(cells := line.split("|")) > 4}
    result = {name.strip(" `"): outcome.strip() for name, outcome in result.items()}
    for row in TOPOLOGIES:
        if row.state == "run":
            assert row.name in DEPLOYMENTS or f'("topology", "{row.name}")' in tests, row.name
            assert result[row.name] == "passed", row.name
        else:
            assert f"def test_{row.name}" in tests, row.name
    names = [row.name for row in TOPOLOGIES]
    assert len(set(names)) == len(names) and set(DEPLOYMENTS) <= set(names)


def test_the_results_say_what_was_run() -> None:
    text = RESULTS.read_text()
    assert "make test-deploy" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows and all(re.search(r"\| `[0-9a-f]{7,}`\+? \| \d{4}-\d\d-\d\d \|$", row) for row in rows)
