# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm families``: the supported model families, from the table of `evs_vllm.adapters`."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from evs_vllm.adapters import FAMILIES
from evs_vllm.cli._options import summary
from evs_vllm.cli._text import table
from evs_vllm.tables import family_rows


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("families", help="list the supported model families", description=summary(__doc__))
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json:
        rows = [asdict(family) for family in FAMILIES]
        print(json.dumps(rows, indent=2))
        return 0
    head, body = family_rows()
    print("\n".join(table([head, *body])))
    return 0
