# SPDX-License-Identifier: Apache-2.0
"""The command ``evs-vllm``. Each subcommand is a module with `add_parser(subparsers)`; none imports torch by itself."""

import argparse
import os
import sys
from collections.abc import Sequence

from evs_vllm import __version__
from evs_vllm.cli import demo, doctor, families, live, plan, uptrain, view
from evs_vllm.cli._options import Parser
from evs_vllm.errors import EVSError


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run``: parsed arguments -> exit code."""
    parser = Parser(prog="evs-vllm", description="Efficient Video Sampling for vLLM: look at what it does, and try it.")
    parser.add_argument("--version", action="version", version=f"evs-vllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (doctor, families, plan, view, live, demo, uptrain):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The words after ``evs-vllm``; those of this process by default.

    Returns:
        0, or 2 after an error, of which stderr got one line, or 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (EVSError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `evs-vllm plan ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"evs-vllm {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"evs-vllm {args.command}: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
