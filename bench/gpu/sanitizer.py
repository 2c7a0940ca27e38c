# SPDX-License-Identifier: Apache-2.0
"""Step "sanitizer": the small inputs of step "ops" under CUDA's compute-sanitizer (memcheck, then racecheck).

Every allocation is a real one, so that a read past the end of a tensor is seen. Needs compute-sanitizer of the CUDA
toolkit.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.step import Asked, asked

TOOLS = ("memcheck", "racecheck")
FOUND = 9
"""Exit code by which compute-sanitizer says that it found something."""


def main(run: Asked) -> None:
    """Runs the tools one after the other."""
    sanitizer = find()
    if not run.on_gpu or sanitizer is None:
        why = "there is no GPU" if not run.on_gpu else "compute-sanitizer of the CUDA toolkit is not installed"
        run.findings.note(f"The sanitizer was not run: {why}.")
        return
    run.findings.table("compute-sanitizer", "tool", "result")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        words = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
        done = subprocess.run(
            [*words, sys.executable, "-m", "bench.gpu.ops", "--smoke"], env=env, capture_output=True, text=True
        )
        print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        result = {0: "nothing found", FOUND: "ERRORS FOUND"}.get(done.returncode, f"ended with {done.returncode}")
        run.findings.row(tool, result)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "Invalid" in line]
            run.findings.problem(f"{tool}: {result}. {' '.join(lines[:3])}")


def find() -> str | None:
    """Where compute-sanitizer is."""
    inside = [Path(os.environ.get(name, "")) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join(map(str, [*inside, "/usr/local/cuda/bin", *os.environ.get("PATH", "").split(os.pathsep)]))
    return shutil.which("compute-sanitizer", path=path)


if __name__ == "__main__":
    main(asked(__doc__))
