# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm view``: the frames as the model sees them, dropped patches faded, as PNG or as HTML with a slider."""

import argparse
from pathlib import Path
from typing import Any

from evs_vllm.cli._options import add_clip_arguments, add_evs_options, evs_config, summary
from evs_vllm.cli.plan import inspect
from evs_vllm.config import EVSConfig
from evs_vllm.core.inspection import Inspection
from evs_vllm.errors import EVSError

SUFFIXES = (".png", ".html")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("view", help="draw which tokens of a video would stay", description=summary(__doc__))
    add_clip_arguments(parser)
    add_evs_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="The picture: out.png, or out.html."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_output(args.output, evs_config(args))
    print(write_view(inspect(args), args.output))
    return 0


def check_output(path: Path, config: EVSConfig) -> None:
    """Refuses an output file that could not be written, before the work is done.

    Raises:
        EVSError: Another suffix than `SUFFIXES`, no such folder, or a page with sliders for the causal budget.
    """
    if config.budget == "causal" and path.suffix.lower() == ".html":
        raise EVSError(
            "The sliders of a page choose by the budget of the clip alone. Draw the causal budget as a picture: "
            "--output out.png."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise EVSError(f"--output got {path}; allowed: a name that ends in {' or '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise EVSError(f"--output got {path}, but there is no folder {path.absolute().parent}.")


def write_view(clip: Inspection, path: Path) -> str:
    """Draws a clip into a file, as its suffix says, and returns a line that says so."""
    from evs_vllm.cli import _html, _sheet

    if path.suffix.lower() == ".html":
        path.write_text(_html.make_html(clip), encoding="utf-8")
    else:
        _sheet.draw_sheet(clip).save(path)
    return f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB): {_sheet.headline(clip)}"
