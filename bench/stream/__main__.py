# SPDX-License-Identifier: Apache-2.0
"""Live video: real ``vllm serve`` processes that are sent a stream chunk by chunk, with a question at every turn.

Vanilla vLLM that is sent everything again with and without its caches, EVS for each chunk by itself, and EVS that goes
on from one chunk to the next, side by side: rows take turns at every turn, and one whose numbers of tokens are wrong
gets no figures.

    python -m bench.stream            # about half an hour on 2 idle cores, estimated
    python -m bench.stream --smoke    # does it work? tiny model; its times mean nothing

writes a JSON file and a Markdown table; ``bench/stream/plot.py`` draws it.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.common import harness
from bench.common.targets import table as targets_table
from bench.serve.bench import say
from bench.serve.pool import Pool, flags
from bench.serve.run import cpu_environment
from bench.serve.settings import local_model
from bench.stream import report
from bench.stream.run import play_all
from bench.stream.settings import Settings, load_settings
from evs_vllm.errors import EVSError
from evs_vllm.serving import stoppable

CONFIGS = harness.ROOT / "configs" / "stream"


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="?", help="a file of configs/stream; by default full.yaml")
    parser.add_argument("--smoke", action="store_true", help="configs/stream/smoke.yaml")
    parser.add_argument("--model", help="folder or name of a real model; by default a small local one is made")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the servers run")
    parser.add_argument("--out", type=Path, help="result file; by default one in bench/results")
    args = parser.parse_args()
    path = args.settings or CONFIGS / ("smoke.yaml" if args.smoke else "full.yaml")
    out = args.out or harness.default_path(harness.RESULTS, args.device, f"stream-{path.stem}")
    try:
        with stoppable():
            return run(load_settings(path), path.name, args.model, args.device, out)
    except EVSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(settings: Settings, name: str, model: str | None, device: str, out: Path) -> int:
    """Measures everything that the settings ask for.

    Returns:
        0, or 1 where a row has no figures.
    """
    if device == "cuda":
        import torch  # noqa: F401  (so that the harness can name the GPU)
    model = model or str(local_model(settings.model))
    content = harness.report("stream", asdict(settings) | {"settings": name}, [], harness.environment())
    content["config"]["model_name"] = Path(model).name
    logs, started = Path(tempfile.mkdtemp(prefix="evs-bench-")), time.monotonic()
    say(f"model     {Path(model).name}\nlogs      {logs}\nresult    {out}")
    for warning in content["warnings"]:
        say(f"warning   {warning}")
    env = settings.env | {"VLLM_NO_USAGE_STATS": "1"} | cpu_environment(device) | dict(os.environ)
    with Pool(model, flags(settings.serve), env, logs, 3, device == "cpu") as pool:
        content["results"] = play_all(settings, model, pool)
    content |= {"wall_s": time.monotonic() - started, "bars": report.bars(content)}
    harness.write(content, out)
    text = report.table(content) + "\n" + targets_table(content["bars"])
    out.with_suffix(".md").write_text(text + "\n")
    print("\n" + text)
    failed = any(played["error"] for played in content["results"])
    if failed:
        say(f"\nlogs      {logs}")
    else:
        shutil.rmtree(logs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
