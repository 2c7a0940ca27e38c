# SPDX-License-Identifier: Apache-2.0
"""End to end: real ``vllm serve`` processes with vanilla vLLM, vLLM's own pruning and this plugin, side by side.

Rows take turns in every repeat, all get the same clips, and a row whose answers fail a check gets no figures.

    python -m bench.serve configs/bench/ten_minutes.yaml

writes a JSON file and a Markdown table; ``bench/serve/plot.py`` draws it, ``bench/serve/compare.py`` compares
two of them.
"""

import argparse
import sys
from pathlib import Path

from bench.common import harness
from bench.serve.run import run
from bench.serve.settings import load_settings
from evs_vllm.errors import EVSError
from evs_vllm.serving import stoppable


def main() -> int:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a file of configs/bench")
    parser.add_argument("--model", help="folder or name of a real model; by default a small local one is made")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the servers run")
    parser.add_argument("--out", type=Path, help="result file; by default one in bench/results")
    parser.add_argument("--keep-logs", action="store_true", help="keep the servers' logs also after a good run")
    args = parser.parse_args()
    settings = load_settings(args.settings)
    kind = f"serve-{args.settings.stem}"
    out = args.out or harness.default_path(harness.RESULTS, args.device, kind)
    try:
        with stoppable():
            return run(settings, args.settings.name, args.model, args.device, out, args.keep_logs)
    except EVSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
