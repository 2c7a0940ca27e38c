# SPDX-License-Identifier: Apache-2.0
"""The command line of a benchmark that is described by a file of configs and writes its result into a folder."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import harness
from bench.common.fetch import MaterialError


def parser_for(name: str, description: str | None) -> argparse.ArgumentParser:
    """Takes ``--config``, ``--smoke`` and ``--output``.

    Args:
        name: Of the benchmark's folder in configs, which has full.yaml and smoke.yaml.
        description: What ``--help`` says.
    """
    configs = harness.ROOT / "configs" / name
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=configs / "full.yaml")
    parser.add_argument(
        "--smoke",
        action="store_const",
        dest="config",
        const=configs / "smoke.yaml",
        help=f"configs/{name}/smoke.yaml: drawn clips, no downloads",
    )
    parser.add_argument("--output", type=Path, help="folder of the result; the tables are printed only by default")
    return parser


def report(
    measure: Callable[[Callable[[str], None]], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    write: Callable[[dict[str, Any], Path], None],
    output: Path | None,
) -> None:
    """Measures, prints the tables, and writes the result where it is asked for.

    Args:
        measure: Given what prints a line at once, the content of the result file.
        markdown: Its tables.
        write: Writes it and its pictures into a folder.
        output: That folder, or None.

    Raises:
        SystemExit: Something could not be fetched; it says what and where to put it instead.
    """
    try:
        result = measure(partial(print, flush=True))
    except MaterialError as error:
        raise SystemExit(str(error)) from None
    print(markdown(result))
    if output:
        write(result, output)
        print(f"written to {output}")
