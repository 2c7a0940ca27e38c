# SPDX-License-Identifier: Apache-2.0
"""The table of all families, found by walking this folder: every module adds the rows of its table `FAMILIES`."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from evs_vllm.testing import write_model
from tests.families.facts import Engine, Facts, FamilyCase

SHARED = ("conftest", "registry", "facts", "processing", "whole_frames")
"""Modules of this folder, beside tests, that are of no family."""


def _discovered() -> dict[str, FamilyCase]:
    found: dict[str, FamilyCase] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if not file.stem.startswith("test_") and file.stem not in SHARED:
            rows = import_module(f"tests.families.{file.stem}").FAMILIES
            assert not found.keys() & rows.keys(), f"{file.stem}: another module has families with these names"
            found |= rows
    return found


FAMILIES: dict[str, FamilyCase] = _discovered()
"""By the id that a family has in the names of tests."""


def names_of(wanted: Callable[[Facts], bool]) -> list[str]:
    """Ids of the families whose facts are `wanted`; in any such list, those that run more engine tests come first.

    pytest groups the tests of a module by the place that a family has in the list of each test: two lists that begin
    alike share their engines.
    """
    chosen = [name for name, case in FAMILIES.items() if wanted(case.facts)]
    return sorted(chosen, key=lambda name: -FAMILIES[name].facts.engine)


def families(wanted: Callable[[Facts], bool]) -> pytest.MarkDecorator:
    """A mark: the test, or with `pytestmark` each of the module, takes every `family` whose facts are `wanted`."""
    return pytest.mark.families(names_of(wanted))


def all_engine_tests(facts: Facts) -> bool:
    return facts.engine >= Engine.ALL


def most_engine_tests(facts: Facts) -> bool:
    return facts.engine >= Engine.MOST


def engine_with_patch_rows(facts: Facts) -> bool:
    return facts.engine >= Engine.SOME and not facts.whole_frames


def engine_with_audio(facts: Facts) -> bool:
    return facts.engine >= Engine.SOME and facts.audio


def engine_with_whole_frames(facts: Facts) -> bool:
    return facts.engine >= Engine.SOME and facts.whole_frames


def make_model(directory: str | Path, family: str, seed: int = 0, **sizes: Any) -> Path:
    """As `evs_vllm.testing.make_model`, of any family of the table."""
    return write_model(directory, FAMILIES[family].tiny, seed, **sizes)
