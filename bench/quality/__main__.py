# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers, in miniature: trains small models here and asks them about drawn clips.

Per seed three models of Qwen2.5-VL's architecture: the base (rate 0, clips of growing length), and from it the control
(more steps at rate 0) and the uptrained one (as many steps at random rates), all by `evs_vllm.train`. Each answers the
same unseen clips at each rate, with tokens chosen by EVS and by simpler ways, with both kinds of positions, and with
the vision tower computing everything, reusing keys and values, or skipping patches without reuse. Some are also asked
through a vLLM engine with the plugin. Nothing is downloaded: ``python -m bench.quality --out
bench/results/cpu/quality`` writes quality.json, .md and .svg; ``--config`` takes another file of configs/quality. Where
it was interrupted it goes on from the models that are done.

Miniature and synthetic: it says whether the method and this code work, not what a big model loses.
"""

import argparse
import json
import os
from pathlib import Path

from bench.common import harness
from bench.quality.lab import be_quiet, measure
from bench.quality.models import Settings
from bench.quality.report import markdown, plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=harness.ROOT / "configs" / "quality" / "full.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where checkpoints go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models at a time (default: the cores)")
    parser.add_argument("--out", type=Path, help="name of the result without suffix; printed only by default")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs got {args.jobs}; at least 1 is needed.")
    be_quiet()
    result = measure(Settings.from_yaml(args.config), args.work, args.jobs)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result))
        plot(result, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
