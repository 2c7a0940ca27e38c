# SPDX-License-Identifier: Apache-2.0
"""An adapter, and new weights in a running engine: compared with a server that was started with these weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.deployments import one_process
from tests.deploy.questions import Said, answers, compare, conversation, questions
from tests.deploy.weights import write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.deploy, pytest.mark.timeout(1800)]

REQUESTS = {**questions(), **conversation()}


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Path:
    return model_dir("qwen2_5_vl")


@pytest.fixture(scope="module")
def weights(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter's folder and that of the merged model."""
    folder = tmp_path_factory.mktemp("weights")
    write_adapter(model, folder / "adapter", folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def before(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    with one_process(model, tmp_path_factory.mktemp("before")) as server:
        return answers(server.post, REQUESTS)


@pytest.fixture(scope="module")
def after(weights: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    with one_process(weights[1], tmp_path_factory.mktemp("after")) as server:
        return answers(server.post, REQUESTS)


def test_lora(
    model: Path,
    weights: tuple[Path, Path],
    before: dict[str, Said],
    after: dict[str, Said],
    tmp_path: Path,
    record_property: Any,
) -> None:
    record_property("topology", "lora")
    options = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={weights[0]}"]
    with one_process(model, tmp_path, *options) as server:
        plain = compare(answers(server.post, REQUESTS, at_once=4), before)
        tuned = {name: {**request, "model": "tuned"} for name, request in REQUESTS.items()}
        adapted = compare(answers(server.post, tuned, at_once=4), after)
    assert any(before[name].tokens != after[name].tokens for name in REQUESTS), "the adapter changes nothing"
    worst = max(plain, adapted)
    record_property("compared", f"{2 * len(REQUESTS)} answers, largest difference of a logprob {worst:.1e}")


def test_weight_reload(
    model: Path,
    weights: tuple[Path, Path],
    before: dict[str, Said],
    after: dict[str, Said],
    tmp_path: Path,
    record_property: Any,
) -> None:
    record_property("topology", "weight_reload")
    served = tmp_path / "model"
    shutil.copytree(model, served)
    with one_process(served, tmp_path, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        worst = compare(answers(server.post, REQUESTS), before)
        for source, expected in ((weights[1], after), (model, before)):
            shutil.copy(source / "model.safetensors", served / "model.safetensors")
            calls = [("/collective_rpc", {"method": "reload_weights"}), ("/reset_encoder_cache", {})]
            for path, body in [*calls, ("/reset_prefix_cache", {})]:
                answer = server.post(body, path)
                assert answer.status_code == 200, answer.text
            worst = max(worst, compare(answers(server.post, REQUESTS), expected))
    record_property("compared", f"{3 * len(REQUESTS)} answers, largest difference of a logprob {worst:.1e}")
