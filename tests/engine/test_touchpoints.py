# SPDX-License-Identifier: Apache-2.0
"""The ledger against the vLLM that is installed. With a new version of vLLM, this is where to begin."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import evs_vllm
from evs_vllm.engine.touchpoints import TOUCHPOINTS, Touchpoint, judge, missing
from evs_vllm.engine.touchpoints.source import find

pytestmark = pytest.mark.vllm

PACKAGE = Path(evs_vllm.__file__).parent
LOGGER = "vllm.evs_vllm"


@pytest.mark.parametrize("touchpoint", TOUCHPOINTS, ids=lambda t: t.where.removeprefix("vllm."))
def test_installed_packages_have_what_we_build_on(touchpoint: Touchpoint) -> None:
    lost = missing(touchpoint)
    assert not lost, f"{lost}.\nNeeded so that {touchpoint.what}: {touchpoint.why}"


def _used(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of vLLM or llvmlite that a file of ours imports or names; the name may be ""."""
    chains: dict[ast.AST, str] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and re.match(r"(vllm|llvmlite)\b", node.module or ""):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if re.match(r"(vllm|llvmlite)\b", a.name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != LOGGER:
            if re.fullmatch(r"(vllm|llvmlite)(\.\w+)+", node.value):
                yield node.value, ""
        elif isinstance(node, ast.Attribute) and node not in chains:
            dotted = _dotted(node)
            chains.update((inner, dotted) for inner in ast.walk(node))
            if dotted.startswith("vllm."):
                module, _, name = dotted.rpartition(".")
                yield module, name


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _has_a_row(module: str, name: str) -> bool:
    def names_it(row: Touchpoint) -> bool:
        home, _, qualified = row.where.partition(":")
        if not name:
            return home == module
        return home == module and (name == qualified.split(".")[0] or (not qualified and name in row.attributes))

    return any(names_it(row) for row in TOUCHPOINTS)


@pytest.mark.parametrize("folder", ["engine", "families"])
def test_whatever_we_import_has_a_row(folder: str) -> None:
    files = [file for file in (PACKAGE / folder).rglob("*.py") if file.parent.name != "touchpoints"]
    used = {file.name: set(_used(file)) for file in files}
    assert folder != "engine" or sum(map(len, used.values())) > 20, "the search finds nothing"
    lost = {name: sorted(pair for pair in pairs if not _has_a_row(*pair)) for name, pairs in used.items()}
    assert not any(lost.values()), f"no row of the ledger names { ({k: v for k, v in lost.items() if v}) }"


CHANGED = "changed signature"
ROW = next(row for row in TOUCHPOINTS if row.where.endswith("Scheduler.add_request"))


@pytest.mark.parametrize(
    ("changes", "verdict", "report"),
    [
        ({"where": "vllm.no_such_module"}, "gone", "is gone"),
        ({"where": "no_such_package:name"}, "gone", "is gone"),
        ({"where": "vllm.v1.core.sched.scheduler:Scheduler.no_such_method"}, "gone", "is gone"),
        (
            {"parameters": ("self", "request", "more")},
            CHANGED,
            r"takes \(self, request\), not \(self, request, more\)",
        ),
        (
            {"parameters": (), "accepts": ("request", "priority_of_ours")},
            CHANGED,
            "does not take priority_of_ours",
        ),
        ({"parameters": (), "where": "vllm.v1.request:Request", "attributes": ("nothing",)}, "gone", "has no nothing"),
        ({"source": ("words that it does not say",)}, "changed source", "no longer says 'words that it does not say'"),
        ({"results": 3}, CHANGED, "does not return 3 values"),
        ({"where": "vllm.v1.core.sched.scheduler:Scheduler"}, CHANGED, r"takes \(\), not"),
    ],
    ids=str,
)
def test_made_up_rows_are_reported(changes: dict, verdict: str, report: str) -> None:  # type: ignore[type-arg]
    assert missing(ROW) == "" and judge(ROW).verdict == "ok"
    row = replace(ROW, **changes)
    assert judge(row).verdict == verdict and re.search(report, missing(row))


def test_reading_agrees_with_importing() -> None:
    compared = 0
    for row in TOUCHPOINTS:
        module, _, names = row.where.partition(":")
        if not row.parameters or ".models." in module:  # importing all models takes long
            continue
        thing = importlib.import_module(module)
        for name in names.split("."):
            thing = inspect.getattr_static(thing, name)
        thing = inspect.unwrap(getattr(thing, "__func__", thing))
        signs = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        imported = [signs.get(p.kind, "") + p.name for p in inspect.signature(thing).parameters.values()]
        found = find(row.where)
        assert found is not None and list(found.parameters() or ()) == imported, row.where
        compared += 1
    assert compared > 10
