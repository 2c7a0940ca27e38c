# SPDX-License-Identifier: Apache-2.0
"""The soak in small: 120 random requests to a server of two API server processes end as they have to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.vllm
@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_soak(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--smoke", "--out", str(tmp_path / "soak.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert not found["wrong"] and not found["tracebacks"]
