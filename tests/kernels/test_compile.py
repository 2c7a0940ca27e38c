# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every GPU we name, without spilled registers and with wide loads; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evs_kernels
from evs_kernels import _triton

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.skipif(not _triton.available()[0], reason=_triton.available()[1])
@pytest.mark.parametrize("target", ["cuda 80", "cuda 90", "cuda 100", "hip gfx942"])
def test_compiles_without_spills(target, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(evs_kernels.__file__).parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *target.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["label"]: row for row in map(json.loads, done.stdout.splitlines())}
    labels = [f"{op}-{t}-{w}" for op in ("score", "cosine") for t in ("fp32", "fp16", "bf16") for w in ("wide", "odd")]
    assert {*labels, "score-u8-wide", "score-u8-odd", "select-i32-01"} <= set(rows)
    # No report would mean that the assembler's wording changed, not that nothing was spilled.
    assert all(row["reports"] == 1 for row in rows.values())
    assert not [row for row in rows.values() if row["spills"]]
    narrow = [row for label, row in rows.items() if label.endswith("-wide") and row["widest_load_bits"] < 128]
    assert not narrow
    if target.startswith("cuda"):
        packed, by_bytes = rows["score-INSTRUCTION-wide"], rows["score-u8-wide"]
        assert packed["packed_differences"] >= 32, "eight words of each of four units"
        assert 2 * packed["instructions"] < by_bytes["instructions"]
        assert not any(row["packed_differences"] for label, row in rows.items() if label != "score-INSTRUCTION-wide")
    # The largest share of shared memory that every target gives without being asked.
    assert max(row["shared_bytes"] for row in rows.values()) <= 48 * 1024
