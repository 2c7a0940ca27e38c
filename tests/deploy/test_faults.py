# SPDX-License-Identifier: Apache-2.0
"""A process that is killed: the server ends and says so, and one that is started anew goes on as if it had not."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from evs_vllm import serving
from tests.deploy.deployments import BLOCK, EVS, one_process
from tests.deploy.questions import Said, answers, compare, conversation
from tests.e2e.server import COMMON, SERVE, START_TIMEOUT_S, Server, server_env

pytestmark = [pytest.mark.vllm, pytest.mark.deploy, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def turns(model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """A conversation about a stream that nothing interrupts."""
    with one_process(model_dir("qwen2_5_vl"), tmp_path_factory.mktemp("uninterrupted")) as server:
        return answers(server.post, conversation())


def is_engine(words: str) -> bool:
    return "EngineCore" in words


def is_api_server(words: str) -> bool:
    """The others, but for what multiprocessing starts for itself."""
    return "EngineCore" not in words and "resource_tracker" not in words


@pytest.mark.parametrize("killed", [is_engine, is_api_server])
def test_a_conversation_outlives_the_server(
    killed: Callable[[str], bool], model_dir: Any, turns: dict[str, Said], tmp_path: Path
) -> None:
    """What a stream's chunks left is in the memory that is lost; it is made again from the conversation."""
    model, requests = model_dir("qwen2_5_vl"), conversation()
    *before, last = requests
    command = [*SERVE, str(model), "--served-model-name", "tiny", *COMMON, "--block-size", str(BLOCK), *EVS]
    command += ["--api-server-count", "2"]
    with serving.stoppable(), serving.starting(command, tmp_path / "log.txt", server_env()) as (url, process):
        serving.wait_until_healthy(url, process, timeout_s=START_TIMEOUT_S)
        server = Server(url, tmp_path / "log.txt")
        compare(answers(server.post, {name: requests[name] for name in before}), turns)
        children = psutil.Process(process.pid).children(recursive=True)
        next(child for child in children if killed(" ".join(child.cmdline()))).kill()
        until = time.monotonic() + 60
        while process.poll() is None:
            # Until it has ended, a request gets an error or no answer, but never another answer.
            try:
                reply = server.post(requests[last])
            except httpx.TransportError:
                time.sleep(0.2)
            else:
                assert reply.status_code >= 500 or compare(answers(lambda _: reply, {last: {}}), turns) is not None  # noqa: B023
            assert time.monotonic() < until, "the server goes on without a process of its own"
        assert process.returncode != 0
    with one_process(model, tmp_path) as server:
        compare(answers(server.post, {last: requests[last]}), turns)
