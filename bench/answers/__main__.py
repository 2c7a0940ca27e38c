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

from pathlib import Path

import torch

from bench.answers.report import markdown, write
from bench.answers.run import measure
from bench.answers.settings import Settings
from bench.common.command import parser_for, report


def main() -> None:
    parser = parser_for("answers", __doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/answers"), help="where trained models are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings.from_yaml(args.config)
    report(lambda log: measure(settings, args.work, log), markdown, write, args.output)


if __name__ == "__main__":
    main()
