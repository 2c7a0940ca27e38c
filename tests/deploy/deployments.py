# SPDX-License-Identifier: Apache-2.0
"""Starts each deployment of `evs_vllm.serving.topologies` on this machine's CPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from evs_vllm import serving
from tests.deploy.questions import Ask
from tests.deploy.router import routing
from tests.e2e.server import COMMON, SERVE, Server, server_env, started

EVS = ["--evs-rate", "0.75", "--evs-request-overrides", "any"]
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
BLOCK = 32
"""Tokens of a KV block, the fewest that the CPU attention takes, so that a prompt has several."""


@dataclass
class Deployment:
    """What is running: how to ask it, and what shows afterwards that it really is that topology."""

    ask: Ask
    evidence: Callable[[], None]
    at_once: int = 1
    """Requests to send at a time, so that all its processes get some."""


Context = Iterator[Deployment]


@contextmanager
def one_process(model: Path, folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """The plain server that others are compared with; `options` are further ones."""
    command = [*SERVE, str(model), "--served-model-name", "tiny", *COMMON, "--block-size", str(BLOCK), *EVS, *options]
    with started(command, folder / "log.txt", env) as server:
        yield server


@contextmanager
def api_servers(model: Path, folder: Path) -> Context:
    with one_process(model, folder, "--api-server-count", "2") as server:

        def evidence() -> None:
            # One process would have looked at each of the three chunks once: a turn that reached the other began anew.
            assert serving.metrics(server.url)["evs:stream_chunks_total"] > 3

        yield Deployment(server.post, evidence, at_once=4)


@contextmanager
def tensor_parallel(model: Path, folder: Path) -> Context:
    with one_process(model, folder, "--tensor-parallel-size", "2", env=TWO_CORES) as server:

        def evidence() -> None:
            assert "Worker_TP1" in server.log or "rank 1" in server.log

        yield Deployment(server.post, evidence)


def finished_by_engine(url: str) -> dict[str, float]:
    """How many requests each engine has finished, by its number."""
    text = serving.read_url(f"{url}/metrics")
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = re.match(r'vllm:request_success_total\{.*engine="(\d+)".*\} (\S+)', line)
        if sample:
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[2])
    return found


def both_engines_worked(url: str) -> None:
    finished = finished_by_engine(url)
    assert len(finished) == 2 and min(finished.values()) > 0, finished


@contextmanager
def data_parallel(model: Path, folder: Path) -> Context:
    with one_process(model, folder, "--data-parallel-size", "2", env=TWO_CORES) as server:
        yield Deployment(server.post, lambda: both_engines_worked(server.url), at_once=4)


@contextmanager
def headless(model: Path, folder: Path) -> Context:
    meet = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1"]
    meet += ["--data-parallel-rpc-port", str(serving.free_port())]
    second = [*SERVE, str(model), "--served-model-name", "tiny", *COMMON, "--block-size", str(BLOCK), *EVS, *meet]
    second += ["--headless", "--data-parallel-start-rank", "1"]
    log = folder / "second.txt"
    here = {**server_env(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (
        serving.running(second, log, here),
        one_process(model, folder, *meet, env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) as server,
    ):

        def evidence() -> None:
            both_engines_worked(server.url)
            assert "Launching 1 data parallel engine(s) in headless mode" in log.read_text()

        yield Deployment(server.post, evidence, at_once=4)


@contextmanager
def replicas(model: Path, folder: Path) -> Context:
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            (folder / str(number)).mkdir()
            servers.append(stack.enter_context(one_process(model, folder / str(number))))
        url, router = stack.enter_context(routing([server.url for server in servers]))

        def evidence() -> None:
            assert min(router.sent) > 0, router.sent
            for server in servers:
                lines = serving.read_url(f"{server.url}/metrics").splitlines()
                rebuilt = [line for line in lines if line.startswith("evs:stream_chunks_total{") and "rebuilt" in line]
                assert all(float(line.split()[-1]) == 0 for line in rebuilt), rebuilt

        yield Deployment(Server(url, folder / "none").post, evidence)


@contextmanager
def shm_cache(model: Path, folder: Path) -> Context:
    with one_process(model, folder, "--mm-processor-cache-type", "shm") as server:
        yield Deployment(server.post, lambda: None)


@contextmanager
def tensor_ipc(model: Path, folder: Path) -> Context:
    spawn = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with one_process(model, folder, "--mm-tensor-ipc", "torch_shm", env=spawn) as server:
        yield Deployment(server.post, lambda: None)


def transfer(kind: str, role: str, connector: str, storage: Path) -> list[str]:
    """The option that makes an engine a part of a disaggregated deployment."""
    extra = {f"{kind}_connector_extra_config": {"shared_storage_path": str(storage)}}
    config = {f"{kind}_connector": connector, f"{kind}_role": f"{kind}_{role}", **extra}
    return [f"--{kind}-transfer-config", json.dumps(config)]


@contextmanager
def pair(model: Path, folder: Path, kind: str, connector: str) -> Iterator[tuple[Server, Server, Path]]:
    """A producer and a consumer, and the folder through which they pass on what they have."""
    storage = folder / "storage"
    with ExitStack() as stack:
        servers = []
        for role in ("producer", "consumer"):
            (folder / role).mkdir()
            options = transfer(kind, role, connector, storage)
            debug = {"VLLM_LOGGING_LEVEL": "DEBUG"} if role == "consumer" else None
            servers.append(stack.enter_context(one_process(model, folder / role, *options, env=debug)))
        yield servers[0], servers[1], storage


def first_token_of(request: dict[str, Any]) -> dict[str, Any]:
    """The request to whoever does the first part of the work."""
    return {**request, "max_completion_tokens": 1, "stream": False}


def media_in(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a request that are no text, in order."""
    contents = [message["content"] for message in request["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if part["type"] != "text"]


@contextmanager
def encoder(model: Path, folder: Path) -> Context:
    with pair(model, folder, "ec", "ECExampleConnector") as (producer, consumer, storage):

        def ask(request: dict[str, Any]) -> httpx.Response:
            if media_in(request):
                first = producer.post(first_token_of(request))
                assert first.status_code == 200, first.text
            return consumer.post(request)

        def evidence() -> None:
            stored = {path.parent.name for path in storage.glob("*/encoder_cache.safetensors")}
            loaded = set(re.findall(r"Success load encoder cache for hash (\S+)", consumer.log))
            assert stored == loaded and any("-evs" in name for name in stored)

        yield Deployment(ask, evidence)


def without_media(request: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """The request with what an encoder answered (``ec_transfer_params``) in place of its media."""
    by_modality: dict[str, dict[int, tuple[str, Any]]] = {}
    for identifier, item in items.items():
        modality = "image" if "image_grid_thw" in item["metadata"] else "video"
        for index in item["item_indices"]:
            by_modality.setdefault(modality, {})[index] = (identifier, item["metadata"])
    # vLLM numbers items as they stand in the prompt.
    answered = iter(sorted((index, m, *each) for m, of in by_modality.items() for index, each in of.items()))

    def replaced(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        _, modality, identifier, metadata = next(answered)
        assert part["type"] == f"{modality}_url"
        return {"type": f"{modality}_embeds", f"{modality}_embeds": metadata, "uuid": identifier}

    messages = [
        {**message, "content": [replaced(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in request["messages"]
    ]
    return {**request, "messages": messages}


@contextmanager
def encoder_metadata(model: Path, folder: Path) -> Context:
    with pair(model, folder, "ec", "ECExampleConnector") as (producer, consumer, _):
        plans = 0

        def ask(request: dict[str, Any]) -> httpx.Response:
            nonlocal plans
            if not media_in(request):
                return consumer.post(request)
            first = producer.post(first_token_of(request))
            assert first.status_code == 200, first.text
            asked = without_media(request, first.json()["ec_transfer_params"])
            plans += json.dumps(asked).count('"evs_plan"')
            assert "base64" not in json.dumps(asked)
            return consumer.post(asked)

        def evidence() -> None:
            assert plans > 0
            assert "Success load encoder cache" in consumer.log

        yield Deployment(ask, evidence)


@contextmanager
def prefill_decode(model: Path, folder: Path) -> Context:
    with pair(model, folder, "kv", "ExampleConnector") as (producer, consumer, storage):

        def ask(request: dict[str, Any]) -> httpx.Response:
            first = producer.post(first_token_of(request))
            assert first.status_code == 200, first.text
            return consumer.post(request)

        def evidence() -> None:
            assert any(storage.iterdir())
            assert "Inject KV cache of" in consumer.log

        yield Deployment(ask, evidence)


DEPLOYMENTS: dict[str, Callable[[Path, Path], Any]] = {
    made.__name__: made
    for made in (
        api_servers,
        tensor_parallel,
        data_parallel,
        headless,
        replicas,
        shm_cache,
        tensor_ipc,
        encoder,
        encoder_metadata,
        prefill_decode,
    )
}
"""Those that answer as one process does, by the names of their rows. LoRA and new weights are compared with another
server, in `test_weights.py`."""
