# SPDX-License-Identifier: Apache-2.0
"""Topologies that no engine was run of: what they call, as far as a test without their hardware can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.errors import UnsupportedError
from evs_vllm.testing import synthetic_clip
from tests.families.processing import arguments_for, plan_in, process, processor_for

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
EVS = {"rate": 0.75}


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Path:
    return model_dir(FAMILY)


def stage(model: Path, tower: Any) -> Any:
    """A pipeline stage of the model without its layers: what vLLM asks of it for position IDs needs none."""
    from evs_vllm.engine.compat import stock_model_class
    from evs_vllm.engine.model import model_class
    from evs_vllm.families import family_of

    config = arguments_for(model, EVS).create_model_config()
    stock = stock_model_class(config.architecture)

    def build(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        torch.nn.Module.__init__(self)
        self.config, self.multimodal_config = config.hf_config, config.multimodal_config
        self.visual = tower

    family = family_of(config.architecture)
    assert family is not None
    made = model_class(type(stock.__name__, (stock,), {"__init__": build}), family)
    scheduler = SimpleNamespace(max_num_encoder_input_tokens=4096)
    vllm_config = SimpleNamespace(model_config=config, additional_config={"evs": EVS}, scheduler_config=scheduler)
    return made(vllm_config=vllm_config)


def test_pipeline_parallel(model: Path) -> None:
    """A later stage has no tower; it is built, and computes the positions of every kept token from the plan."""
    from vllm.model_executor.models.utils import StageMissingLayer
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    later = stage(model, StageMissingLayer("vision_tower"))
    assert later._evs_tower is None

    frames = synthetic_clip(12, (84, 112), moving=0.3, seed=720)
    pruned, whole = (process(processor_for(model, evs), frames) for evs in (EVS, None))

    def positions(result: Any) -> torch.Tensor:
        feature = MultiModalFeatureSpec(
            data=result["mm_kwargs"]["video"][0],
            modality="video",
            identifier=result["mm_hashes"]["video"][0],
            mm_position=result["mm_placeholders"]["video"][0],
        )
        return later.get_mrope_input_positions(result["prompt_token_ids"], [feature])[0]

    plan, place = plan_in(pruned), whole["mm_placeholders"]["video"][0]
    assert plan is not None
    stays = np.ones(len(whole["prompt_token_ids"]), dtype=bool)
    stays[place.offset : place.offset + place.length] = plan.mask.reshape(-1)
    assert torch.equal(positions(pruned), positions(whole)[:, torch.from_numpy(stays)])


def test_a_stage_with_its_tower_reuses(model: Path) -> None:
    from vllm.model_executor.models.utils import StageMissingLayer

    from evs_vllm.engine.model import tower_is_elsewhere

    whole = torch.nn.Module()
    whole.visual, whole.language_model = torch.nn.Identity(), StageMissingLayer("language_model")
    whole._language_model_names = ["language_model"]  # as in an encoder apart
    assert not tower_is_elsewhere(whole)
    whole.visual = StageMissingLayer("vision_tower", torch.nn.Identity())
    assert tower_is_elsewhere(whole)


def test_ray(model: Path, tmp_path: Path) -> None:
    """Ray's workers get the configuration pickled, and load plugins before they look at it."""
    import cloudpickle
    from vllm.engine.arg_utils import EngineArgs

    from evs_vllm.engine.plugin import register

    register()
    config = EngineArgs(model=str(model), additional_config={"evs": EVS}).create_engine_config()
    (tmp_path / "config").write_bytes(cloudpickle.dumps(config))
    code = """
import pickle, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
config = pickle.load(open(sys.argv[1], "rb")).model_config
from vllm import ModelRegistry
from evs_vllm.engine.attached import settings_of
from evs_vllm.engine.model import EVSModelMixin
cls, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
print("found:", settings_of(config).rate, issubclass(cls, EVSModelMixin))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "config")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == ["found: 0.75 True"], run.stderr[-2000:]


def test_rust_frontend(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable itself would not be read again where an engine ran before.
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True, raising=False)
    with pytest.raises(UnsupportedError, match="Rust frontend"):
        arguments_for(model, EVS).create_model_config()


@pytest.mark.deploy
def test_sleep(engines: Any, reference: Any) -> None:
    """An engine that slept and woke answers as before, and level 2 can give up no tensor that only we would know."""
    from tests.e2e.harness import ask, run_and_check
    from tests.reference.hf import Settings

    engine = engines.get(FAMILY, {"rate": 0.75, "encoder": "reuse", "request_overrides": "any", "selection": "paper"})
    requests = [
        ask(synthetic_clip(16, noise=2, seed=730), Settings(0.75), evs_encoder="full"),
        ask(synthetic_clip(16, noise=2, seed=731), Settings(0.5), evs_rate=0.5, evs_encoder="full"),
    ]
    run_and_check(engine, reference(FAMILY), requests)
    engine.generate([ask(synthetic_clip(16, noise=2, seed=732))])  # through the wrapped tower, too
    for level in (0, 1, 2):
        engine.llm.sleep(level=level)
        engine.llm.wake_up()
        run_and_check(engine, reference(FAMILY), requests)
    served = engine.runner.model
    known = {id(each) for each in (*served.parameters(), *served.buffers())}
    ours = [value for name, value in vars(served).items() if name.startswith("_evs")]
    assert served._evs_tower is not None
    assert not [tensor for value in ours for tensor in tensors_in(value) if id(tensor) not in known]


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Tensors that an object of ours holds, not counting those of modules, which vLLM knows."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module) or depth == 0:
        return
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from tensors_in(each, depth - 1)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()), depth - 1)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(list(vars(value).values()), depth - 1)
