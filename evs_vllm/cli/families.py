# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm families``: the supported model families, from the table of `evs_vllm.adapters`."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from evs_vllm.adapters import FAMILIES
from evs_vllm.cli._options import summary
from evs_vllm.cli._text import table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("families", help="list the supported model families", description=summary(__doc__))
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json:
        rows = [asdict(family) for family in FAMILIES]
        print(json.dumps(rows, indent=2))
        return 0
    head: tuple[str, ...] = ("family", "architectures", "positions", "clip in the prompt", "compared with", "limits")
    body: list[tuple[str, ...]] = [
        (family.name, ", ".join(family.architectures), family.positions, family.layout, family.proof, family.limits)
        for family in FAMILIES
    ]
    if not any(row[-1] for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    print("\n".join(table([head, *body])))
    return 0
