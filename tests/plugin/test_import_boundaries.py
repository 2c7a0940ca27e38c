# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: vLLM is known to plugin, compat and adapters only, and the kernels know nobody."""

import pkgutil
import subprocess
import sys

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


KNOW_VLLM = {"plugin", "compat", "adapters"}
BELOW = [n for n in modules(evs_vllm) if n.split(".")[1] not in KNOW_VLLM]


def test_only_three_know_vllm() -> None:
    found = imported([*BELOW, "evs_vllm.plugin", "evs_vllm.adapters", "evs_vllm.adapters.base"])
    assert "vllm" not in found
    assert "evs_kernels" in found


def test_kernels_know_nobody() -> None:
    assert not {"vllm", "evs_vllm"} & imported(modules(evs_kernels))


@pytest.mark.parametrize(
    "name", ["evs_vllm", "evs_vllm.options", "evs_vllm.config", "evs_vllm.errors", "evs_vllm.versions"]
)
def test_light_modules_stay_light(name: str) -> None:
    assert not {"torch", "vllm", "numpy"} & imported([name])


ORDER = ["errors", "options", "config", "plan", "scoring", "select", "prompt", "positions", "apply", "reuse"]


@pytest.mark.parametrize("name", ORDER)
def test_layers_import_downwards_only(name: str) -> None:
    code = f"import sys, evs_vllm.{name}; print(' '.join(m for m in sys.modules if m.startswith('evs_vllm.')))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = {m.split(".")[1] for m in run.stdout.strip().splitlines()[-1].split()}
    assert found <= set(ORDER[: ORDER.index(name) + 1])
