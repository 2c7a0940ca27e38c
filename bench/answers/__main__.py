# SPDX-License-Identifier: Apache-2.0
"""What a small language model answers that sees real clips and photos through a pretrained tower, at equal counts.

Frozen features of DINOv2-small; a decoder of a few million weights is trained on them from random weights, with
questions about objects that come, leave, move and change before real clips and moving photos. Then it is asked about
scenes of clips and photos that it has never seen, with tokens chosen in several ways, both kinds of positions, and a
tower that computes everything, reuses keys and values, or leaves dropped patches out. Clips, photos and weights are
fetched on first use and kept in the temporary directory with the tower's features. ``python -m bench.answers --output
bench/results/answers`` writes answers.json and .md; ``--config configs/answers/choose.yaml`` asks about other clips,
for what is still to be chosen. A run that was interrupted goes on from the features and models that are done.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from bench.answers.report import markdown, write
from bench.answers.run import measure
from bench.answers.settings import Settings
from bench.common import harness
from bench.common.fetch import MaterialError

CONFIGS = harness.ROOT / "configs" / "answers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "full.yaml")
    parser.add_argument("--smoke", action="store_true", help="configs/answers/smoke.yaml: drawn clips, no downloads")
    parser.add_argument("--work", type=Path, default=Path("runs/answers"), help="where trained models are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--output", type=Path, help="folder of the result; the tables are printed only by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        settings = Settings.from_yaml(CONFIGS / "smoke.yaml" if args.smoke else args.config)
        result = measure(settings, args.work, partial(print, flush=True))
    except MaterialError as error:
        raise SystemExit(str(error)) from None
    print(markdown(result))
    if args.output:
        write(result, args.output)
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
