# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm uptrain``: continued training with random pruning rates, from one YAML file (configs/train/)."""

import argparse
from pathlib import Path
from typing import Any

from evs_vllm.cli._options import summary


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "uptrain", help="train a model further with random pruning rates", description=summary(__doc__)
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML recipe.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="DIR",
        help="Go on from a checkpoint folder, or from the last one of trainer.output_dir.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from evs_vllm.train import recipe

    trainer = recipe.run(recipe.Recipe.from_yaml(args.config), args.resume)
    print(f"The checkpoint is in {trainer.args.output_dir}.")
    return 0
