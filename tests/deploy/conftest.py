# SPDX-License-Identifier: Apache-2.0
"""Slow deployments run when they are asked for (``-m deploy``), and can write down what came of it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deploy-report",
        metavar="FILE",
        help="write what came of the deployments to this Markdown file",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "deploy" in config.getoption("markexpr") or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("deploy")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


OUTCOMES: dict[str, tuple[str, str, float]] = {}
"""By topology: outcome, what was compared or why it failed, seconds."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    said = dict(report.user_properties)
    name = said.get("topology")
    if name is None or report.when != "call":
        return
    lines = [line for line in str(report.longrepr or "").splitlines() if line.startswith("E ")]
    reason = lines[0].removeprefix("E ").strip() if lines else ""
    OUTCOMES[str(name)] = (report.outcome, reason or str(said.get("compared", "")), report.duration)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Rewrites the rows of what was run and leaves the others, each with the commit that it was run with."""
    file = config.getoption("deploy_report", None)  # unknown where this file is read late
    if not file:
        return
    import vllm

    path = Path(file)
    rows = {}
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.startswith("| `")]
        rows = {line.split("`")[1]: line for line in lines}
    changed = "+" if _git("status", "--porcelain", "--", "evs_vllm", "kernels", "tests/deploy") else ""
    commit, today = f"`{_git('rev-parse', '--short', 'HEAD')}`{changed}", f"{datetime.date.today():%Y-%m-%d}"
    titles = dict(_rows())
    for name, (outcome, about, seconds) in OUTCOMES.items():
        rows[name] = f"| `{name}` | {titles[name]} | {outcome} | {about} | {seconds:.0f} | {commit} | {today} |"
    text = f"""# Deployments compared with one process

Written by `make test-deploy` with vLLM {vllm.__version__}, Python {platform.python_version()},
{os.cpu_count()} CPU cores, no GPU, and a tiny Qwen2.5-VL in fp32. Each deployment is started, asked the same requests
as one process (rates, selections, positions, a threshold, pictures, a conversation about a stream; in the order of the
reference and in another one), and has to give the same prompts, the same greedy tokens, and every reported logprob
within 1e-4. A plus after a commit says that its code was changed.

| name | topology | outcome | compared, or what failed | seconds | commit | date |
| --- | --- | --- | --- | ---: | --- | --- |
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n".join(rows[name] for name in titles if name in rows) + "\n")
    terminalreporter.write_line(f"deployments: {file}")


def _rows() -> list[tuple[str, str]]:
    from evs_vllm.serving.topologies import TOPOLOGIES

    return [(row.name, row.title) for row in TOPOLOGIES if row.state == "run"]
