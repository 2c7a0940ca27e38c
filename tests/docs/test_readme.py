# SPDX-License-Identifier: Apache-2.0
"""The README says what the code says."""

import re
import shlex
from pathlib import Path

import pytest

from evs_vllm.cli import tables
from evs_vllm.options import OPTIONS
from evs_vllm.versions import TESTED_VLLM

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_are_up_to_date() -> None:
    for name in tables.TABLES:
        assert f"<!-- {name}:begin -->\n|" in README, "run python -m evs_vllm.cli.tables README.md"
    assert tables.rewrite(README) == README, "run python -m evs_vllm.cli.tables README.md"


def test_every_flag_in_the_text_exists() -> None:
    flags = {option.flag for option in OPTIONS}
    text = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    assert set(re.findall(r"--evs-[a-z-]*[a-z]", text)) - {"--evs"} <= flags
    keys = {option.request_key for option in OPTIONS if option.per_request} | {"evs_vllm", "evs_kernels"}
    assert set(re.findall(r"\bevs_[a-z_]*[a-z]", README)) <= keys


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("evs-vllm")])
def test_our_commands_parse(command: str) -> None:
    from evs_vllm.cli import make_parser

    make_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.vllm
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("vllm serve")])
def test_serve_commands_parse(command: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from evs_vllm.engine.plugin import register

    register()
    words = shlex.split(command)[3:]
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    assert any(getattr(args, option.request_key) is not None for option in OPTIONS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in {c.split()[1] for c in commands() if c.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_and_files_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for folder in re.findall(r"`(configs/[a-z_/]+|bench/[a-z_/.]+)`", README):
        assert (ROOT / folder).exists(), folder


def test_versions_in_the_text() -> None:
    for major, minor in TESTED_VLLM:
        assert f"{major}.{minor}" in README


def test_metrics_in_the_text() -> None:
    from evs_vllm.engine import metrics

    names = set(re.findall(r"evs:[a-z_]+", README))
    assert names and names <= set(re.findall(r"evs:[a-z_]+", metrics.__doc__ or ""))
