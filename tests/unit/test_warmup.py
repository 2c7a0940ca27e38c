# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no plan compiles anything, on a CPU and where clips are on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evs_kernels import _triton

SCRIPT = Path(__file__).with_name("compiled_kernels.py")


def watched(kind: str, **env: str) -> tuple[int, int, int, str]:
    """Kinds of kernels of the warm-up, launches or compilations afterwards, those of other kinds, and their names."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), kind], env=os.environ | env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    numbers = re.search(r"warmed up (\d+) then (\d+) new (\d+)", run.stdout)
    assert numbers, run.stdout
    return *map(int, numbers.groups()), run.stdout  # type: ignore[return-value]


def test_no_plan_compiles_on_the_cpu(tmp_path: Path) -> None:
    warmed, later, _, names = watched("numba", NUMBA_CACHE_DIR=str(tmp_path))
    assert warmed > 0 and later == 0, names


@pytest.mark.slow
@pytest.mark.skipif(not _triton.available()[0], reason=_triton.available()[1])
def test_no_plan_compiles_on_a_gpu() -> None:
    warmed, launches, new, names = watched("triton", TRITON_INTERPRET="1", EVS_KERNELS_BACKEND="triton")
    assert warmed > 0 and launches > 0 and new == 0, names
