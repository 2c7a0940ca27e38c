# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code says: its tables, links, files, commands, flags and figures."""

import ast
import re
import shlex
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from evs_vllm.cli import tables
from evs_vllm.options import OPTIONS
from evs_vllm.requests import AFTER_KEY
from evs_vllm.versions import TESTED_VLLM

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench/README.md"]
FILES += [ROOT / "kernels/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
README = TEXTS["README.md"]
TABLES_COMMAND = "run python -m evs_vllm.cli.tables README.md docs/*.md"
PLACEHOLDERS = re.compile(r"\bfoo\b|FILE|OLD|NEW|\.\.\.|\*")
"""What stands in the place of a name in a path."""


def blocks(text: str, languages: str) -> list[str]:
    found = re.findall(rf"^( *)```(?:{languages})\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) for _, body in found]


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """Each line of shell blocks, without its comment, and what inline code runs as a module."""
    lines = "".join(blocks(text, "bash|sh")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(python -m [^`]+)`", without_blocks(text))
    return [line.split("  #")[0].strip() for line in [*lines, *inline] if line.strip()]


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(name: str) -> list[tuple[Path, str]]:
    """The relative links of a page: (file, anchor)."""
    found = re.findall(r"\]\((?!\w+://)([^)#\s]*)#?([^)\s]*)\)", TEXTS[name])
    return [((ROOT / name).parent / path if path else ROOT / name, anchor) for path, anchor in found]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name: str) -> None:
    for path, anchor in links(name):
        assert path.exists(), path
        if anchor:
            assert anchor in anchors(path.read_text()), f"{path} has no heading #{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set(), ["README.md"]
    while ahead:
        name = ahead.pop()
        if name in seen or name not in TEXTS:
            continue
        seen.add(name)
        ahead += [str(path.resolve().relative_to(ROOT)) for path, _ in links(name)]
    assert set(TEXTS) - {"CHANGELOG.md"} <= seen


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_up_to_date(name: str) -> None:
    assert tables.rewrite(TEXTS[name]) == TEXTS[name], TABLES_COMMAND


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_table_stands_in_one_place(table: str) -> None:
    assert sum(text.count(f"<!-- {table}:begin -->\n") for text in TEXTS.values()) == 1, TABLES_COMMAND


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name: str) -> None:
    """Paths from the root, in inline code."""
    folders = "evs_vllm|kernels|bench|configs|tests|docs|docker"
    named = set(re.findall(rf"`((?:{folders})/[\w/.-]*)`", TEXTS[name]))
    if name == "bench/README.md":
        named.remove("bench/serve.py")  # what it was once
    assert not [path for path in sorted(named) if not PLACEHOLDERS.search(path) and not (ROOT / path).exists()]


def test_the_tree_is_that_of_the_repository() -> None:
    """What CONTRIBUTING.md draws exists; where it lists the files of a folder, it lists all of them."""
    (tree,) = blocks(TEXTS["CONTRIBUTING.md"], "text")
    folders: list[tuple[int, Path]] = []
    listed: dict[Path, set[str]] = {}
    for line in tree.splitlines():
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        here = folders[-1][1] if folders else ROOT
        if first.endswith("/"):
            folders.append((indent, here / first))
            assert (here / first).is_dir(), here / first
        elif first.endswith(".py"):
            listed.setdefault(here, set()).update(word for word in line.split() if word.endswith(".py"))
    assert listed
    for folder, files in listed.items():
        assert files == {file.name for file in folder.glob("*.py")} - {"__init__.py"}, folder


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_in_the_text_exists(name: str) -> None:
    flags = {option.flag for option in OPTIONS}
    assert set(re.findall(r"--evs-[a-z-]*[a-z]", TEXTS[name])) <= flags


@pytest.mark.parametrize("name", [name for name in TEXTS if name == "README.md" or name.startswith("docs/")])
def test_every_request_key_in_the_text_exists(name: str) -> None:
    keys = {option.request_key for option in OPTIONS if option.per_request} | {AFTER_KEY}
    others = {"evs_vllm", "evs_kernels", "evs_plans", "evs_cells"}  # packages, arguments of evs_vllm.hf
    assert set(re.findall(r"\bevs_[a-z_]*[a-z]", TEXTS[name])) <= keys | others


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("evs-vllm")])
def test_our_commands_parse(command: str) -> None:
    from evs_vllm.cli import make_parser

    make_parser().parse_args(shlex.split(command)[1:])


def test_our_subcommands_exist() -> None:
    from evs_vllm.cli import make_parser

    listed = re.findall(r"^    (\w+) ", make_parser().format_help(), re.MULTILINE)
    named = {word for text in TEXTS.values() for word in re.findall(r"`evs-vllm (\w+)", text)}
    assert named and named <= set(listed)


@pytest.mark.vllm
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vllm serve")])
def test_serve_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from evs_vllm.engine.plugin import register

    register()
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[2:]
    words = words[1:] if not words[0].startswith("-") else words
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    assert any(getattr(args, option.request_key) is not None for option in OPTIONS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m" in c])
def test_modules_that_commands_run_exist(command: str) -> None:
    words = shlex.split(command.replace("$", ""))
    module = words[words.index("-m") + 1]
    spec = find_spec(module)
    assert spec is not None, module
    if spec.submodule_search_locations is not None:
        assert find_spec(f"{module}.__main__") is not None, module
    for word in words[words.index("-m") + 2 :]:
        if re.match(r"(tests|configs|bench|docs)/", word) and not PLACEHOLDERS.search(word):
            assert (ROOT / word).exists(), word


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for text in TEXTS.values() for target in re.findall(r"^`?make ([a-z]+)|`make ([a-z]+)", text, re.M)}
    targets = {a or b for a, b in named}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", TEXTS)
def test_python_in_the_text_is_python(name: str) -> None:
    for block in blocks(TEXTS[name], "python"):
        ast.parse(block)


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def test_measured_figures_are_those_of_the_result_file() -> None:
    """Time to first token, speed-up and prompt tokens; docs/measured.md has the same table."""
    marked = re.search(r"<!-- measured:begin -->\n(.*?)<!-- measured:end -->", README, re.DOTALL)
    assert marked is not None
    assert marked[1] in TEXTS["docs/measured.md"].replace(" (*)", "")
    result = (ROOT / "bench/results/cpu/2026-11-23-serve-full.md").read_text()
    heading, _, *servers, tokens = [cells(line) for line in marked[1].splitlines()]
    for column, rate in enumerate((cell.split()[1] for cell in heading[1:]), 1):
        section = result.split(f"**32 frames, q={rate}, 1 at a time, real clips**")[1].split("\n\n")[1]
        measured = [cells(line) for line in section.splitlines()[2:]]
        for server, (_, _, seconds, _, _, speed_up, *_) in zip(servers, measured, strict=True):
            said = re.fullmatch(r"([\d.]+) s(?:, ([\d.]+)x)?", server[column])
            assert said is not None and said[1] == seconds
            assert abs(float(said[2] or 1) - float(speed_up.rstrip("x"))) <= 0.05
        assert tokens[column] == measured[-1][1]


def test_versions_in_the_text() -> None:
    for major, minor in TESTED_VLLM:
        assert f"{major}.{minor}" in README and f"{major}.{minor}" in TEXTS["docs/limits.md"]


def test_metrics_in_the_text() -> None:
    from evs_vllm.engine import metrics

    names = set(re.findall(r"evs:[a-z_]+", TEXTS["docs/options.md"]))
    assert names and names <= set(re.findall(r"evs:[a-z_]+", metrics.__doc__ or ""))
