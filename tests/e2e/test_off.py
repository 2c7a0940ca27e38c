# SPDX-License-Identifier: Apache-2.0
"""Installed but off, vLLM is vLLM: each case in a process of its own, compared byte for byte."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parent.parent.parent
CASES = {
    "without the plugin": ({"VLLM_PLUGINS": ""}, None),
    "not asked for": ({}, None),
    "rate 0": ({}, {"rate": 0}),
    "on": ({}, {"rate": 0.5}),
}


@pytest.fixture(scope="module")
def reports(model_dir, family, tmp_path_factory):
    folder, directory = tmp_path_factory.mktemp("off"), str(model_dir(family))

    def report(name):
        variables, evs = CASES[name]
        env = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"} | variables
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        file = folder / f"{name}.json"
        command = [sys.executable, "-m", "tests.e2e.off_worker", directory, json.dumps(evs), str(file)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(file.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(report, CASES)))


def test_the_plugin_is_there_only_where_it_should_be(reports):
    assert {name: bool(report["plugin"]) for name, report in reports.items()} == {
        "without the plugin": False, "not asked for": True, "rate 0": True, "on": True,
    }  # fmt: skip


def test_the_model_is_vllms_own_class(reports):
    assert reports["not asked for"]["model"] == reports["without the plugin"]["model"]


@pytest.mark.parametrize("what", ["prompt", "hashes", "placeholders", "kwargs", "tokens", "logprobs", "cached"])
@pytest.mark.parametrize("case", ["not asked for", "rate 0"])
def test_nothing_differs(reports, case, what):
    stock, ours = reports["without the plugin"]["requests"], reports[case]["requests"]
    assert len(stock) == len(ours) == 7
    assert [r[what] for r in ours] == [r[what] for r in stock]


@pytest.mark.parametrize("what", ["prompt", "hashes", "placeholders", "kwargs", "tokens", "logprobs"])
def test_the_comparison_can_fail(reports, what):
    stock, ours = reports["without the plugin"]["requests"], reports["on"]["requests"]
    assert [r[what] for r in ours] != [r[what] for r in stock]
    assert ours[2][what] == stock[2][what], "a request with an image only never differs"
    assert ours[3][what] == stock[3][what], "nor does one with text only"
