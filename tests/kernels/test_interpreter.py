# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton cases of this folder in a process that interprets Triton kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evs_kernels
from evs_kernels import _triton

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not _triton.available()[0], reason=_triton.available()[1])
@pytest.mark.skipif(_triton.interpreting(), reason="this process interprets already, so the cases run in it")
def test_triton_cases_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(evs_kernels.__file__).parents[1])}
    files = [str(HERE / name) for name in ("test_ops.py", "test_golden.py", "test_triton.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-k", "triton", *files], env=env, capture_output=True, text=True, timeout=800)
    print(done.stdout[-8000:], done.stderr[-2000:])
    assert done.returncode == 0
    # A run in which everything was skipped would also exit with 0.
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 100
