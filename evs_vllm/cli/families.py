# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm families``: the supported model families and the refused ones, from the tables of `evs_vllm.families`."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from evs_vllm.cli._options import summary
from evs_vllm.cli.tables import family_rows, refused_rows
from evs_vllm.families import FAMILIES
from evs_vllm.families.refused import REFUSED
from evs_vllm.text import table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "families", help="list the supported and the refused model families", description=summary(__doc__)
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json:
        rows = [asdict(family) | {"supported": True} for family in FAMILIES]
        rows += [asdict(row) | {"supported": False} for row in REFUSED]
        print(json.dumps(rows, indent=2))
        return 0
    for head, body in family_rows(), refused_rows():
        print("\n".join(table([head, *body])))
        print()
    return 0
