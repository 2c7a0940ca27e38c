# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: vLLM is known to the engine folder only, and the kernels know nobody."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import evs_kernels
import evs_vllm


def modules(package: object) -> list[str]:
    return [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]  # type: ignore[attr-defined]


def imported(names: list[str]) -> set[str]:
    """Top-level packages that importing `names` in a fresh process brings in."""
    code = (
        f"import importlib, sys; [importlib.import_module(n) for n in {names!r}];"
        "print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(run.stdout.strip().splitlines()[-1].split())


BELOW = [n for n in modules(evs_vllm) if n.split(".")[1] != "engine"]


def test_only_the_engine_knows_vllm() -> None:
    found = imported(BELOW)
    assert "vllm" not in found
    assert "evs_kernels" in found


def test_kernels_know_nobody() -> None:
    assert not {"vllm", "evs_vllm"} & imported(modules(evs_kernels))


@pytest.mark.parametrize(
    "name",
    [
        "evs_vllm",
        "evs_vllm.options",
        "evs_vllm.config",
        "evs_vllm.errors",
        "evs_vllm.serving",
        "evs_vllm.versions",
        "evs_vllm.fingerprint",
    ],
)
def test_light_modules_stay_light(name: str) -> None:
    assert not {"torch", "vllm", "numpy"} & imported([name])


FLOORS = (
    ("errors", "envs", "versions", "text"), ("options", "serving"), ("config",), ("requests", "fingerprint"), ("core",),
    ("families",), ("engine", "hf"), ("train",), ("demo", "live"), ("cli",),
)  # fmt: skip
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
"""Rooms of the package by floor: imports go down, or stay within a room. `testing` is a leaf that anybody may use."""
FILES = sorted(Path(evs_vllm.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parent)))
def test_imports_go_down(path: Path) -> None:
    """Also imports inside functions."""
    here = path.relative_to(FILES[0].parent).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        if here != "engine":
            assert not any(name.split(".")[0] == "vllm" for name in names), f"line {node.lineno} imports vLLM"
        for there in {name.split(".")[1] for name in names if name.startswith("evs_vllm.")} - {here}:
            if there in ROOMS and here in ROOMS:
                assert ROOMS[there] < ROOMS[here], f"line {node.lineno} imports {there}"


def test_nothing_goes_by_the_clock_on_the_wall() -> None:
    """It jumps, when a machine's time is set; what waits or measures goes by clocks that do not."""
    found = []
    for package in (evs_vllm, evs_kernels):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                    continue
                if f"{node.value.id}.{node.attr}" in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
