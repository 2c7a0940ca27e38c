# SPDX-License-Identifier: Apache-2.0
"""Position IDs of models with 1-D RoPE: how many there are, where an answer ends, what reaches the language model."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.engine.limits import RESERVE, cap_answer_length, positions_left
from evs_vllm.engine.model import OneAxisMixin
from evs_vllm.engine.plan_field import PLAN_FIELD
from evs_vllm.families.rotary import rotary_length

pytestmark = pytest.mark.vllm

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn, context given": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, context scaled": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip


def rope_of(parameters: dict[str, Any], max_model_len: int) -> Any:
    """The rotary embedding that vLLM makes in an engine of that context length."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=max_model_len)  # type: ignore[assignment]
    rotary_embedding._ROPE_DICT.clear()  # it does not tell context lengths apart
    with set_current_vllm_config(config):
        return rotary_embedding.get_rope(32, max_position=512, rope_parameters=parameters, dtype=torch.float32)


@pytest.mark.parametrize("name", ROPES)
def test_rotary_length_is_that_of_vllms_cache(name: str) -> None:
    parameters = ROPES[name] | {"rope_theta": 10000.0}
    config = SimpleNamespace(max_position_embeddings=512, rope_parameters=parameters)
    assert rotary_length(config, 512) == len(rope_of(parameters, 512).cos_sin_cache)


@pytest.mark.parametrize("max_model_len", [64, 128, 129, 512])
def test_ids_of_longrope_are_angles_up_to_its_length_and_not_behind_it(max_model_len: int) -> None:
    short, long = [1.0] * 16, [1 + place / 4 for place in range(16)]
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
        "short_factor": short, "long_factor": long, "short_mscale": 1.0, "long_mscale": 1.0,
    }  # fmt: skip
    config = SimpleNamespace(max_position_embeddings=512, rope_parameters=parameters)
    rope = rope_of(parameters, max_model_len)
    length = rotary_length(config, max_model_len)
    assert length == (128 if max_model_len <= 128 else 512)

    def turned(position: int) -> torch.Tensor:
        ones = torch.ones(1, 32)
        return rope(torch.tensor([position]), ones, ones.clone())[0][0]  # type: ignore[no-any-return]

    factors = torch.tensor(short if max_model_len <= 128 else long)
    speed = 10000.0 ** -(torch.arange(0, 32, 2) / 32) / factors
    for position in (0, 1, length - 1):
        angle = (position * speed).double()
        expected = torch.cat([angle.cos() - angle.sin(), angle.cos() + angle.sin()]).float()
        torch.testing.assert_close(turned(position), expected, atol=1e-4, rtol=0)
    if length == 128:  # silently another angle
        angle = (128 * speed).double()
        assert (turned(128)[:16] - (angle.cos() - angle.sin()).float()).abs().max() > 0.1
    else:
        with pytest.raises(IndexError):
            turned(length)


def test_rotary_length_of_layers_that_differ_is_the_shortest() -> None:
    kinds = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 4.0}}
    assert rotary_length(SimpleNamespace(max_position_embeddings=512, rope_parameters=kinds), 512) == 512


def test_positions_left() -> None:
    layout = Layout.contiguous(1, 320)
    keep, sequential = (
        RetentionPlan((20, 4, 4), np.arange(20), positions).with_layout(layout, 320)
        for positions in ("keep", "sequential")
    )
    assert positions_left(100, [keep], 512) == 512 - RESERVE - 400
    assert positions_left(100, [sequential], 512) == positions_left(100, [], 512) == 512 - RESERVE - 100


def request_with(plan: RetentionPlan | None, **fields: Any) -> Any:
    data = {name: SimpleNamespace(data=value) for name, value in fields.items()}
    if plan is not None:
        data[PLAN_FIELD] = SimpleNamespace(data=torch.from_numpy(plan.to_array()))
    return SimpleNamespace(mm_features=[SimpleNamespace(data=data)], num_prompt_tokens=120, max_tokens=1000)


def test_answers_end_where_the_position_ids_do() -> None:
    text = SimpleNamespace(max_position_embeddings=512)
    model_config = SimpleNamespace(
        architecture="LlavaNextVideoForConditionalGeneration",
        hf_config=SimpleNamespace(get_text_config=lambda: text),
        max_model_len=512,
    )
    layout = Layout.contiguous(1, 320)
    keep, sequential = (
        RetentionPlan((20, 4, 4), np.arange(80), positions).with_layout(layout, 320)
        for positions in ("keep", "sequential")
    )
    for plan, expected in ((keep, 512 - RESERVE - 120 - 240), (sequential, 1000), (None, 1000)):
        request = request_with(plan)
        cap_answer_length(model_config, request)
        assert request.max_tokens == expected
    short = request_with(keep)
    short.max_tokens = 7
    cap_answer_length(model_config, short)
    assert short.max_tokens == 7


@pytest.mark.parametrize("engine_core", [True, False])
def test_engine_cores_of_their_own_end_answers_too(engine_core: bool) -> None:
    """A spawned engine core loads plugins after its own module and before its scheduler's; others need neither."""
    code = (
        f"{'import vllm.v1.engine.core' if engine_core else ''}\n"
        "import sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "scheduler = sys.modules.get('vllm.v1.core.sched.scheduler')\n"
        "print(hasattr(scheduler and scheduler.Scheduler.add_request, '__evs_wrapped__'))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip().splitlines()[-1] == str(engine_core)


def test_the_language_model_gets_one_axis() -> None:
    class Stock:
        def forward(self, input_ids: Any, positions: Any, intermediate: Any = None, inputs_embeds: Any = None) -> Any:
            return positions, intermediate, inputs_embeds

    class Model(OneAxisMixin, Stock):
        pass

    positions = torch.arange(15).view(3, 5)
    got, intermediate, embeds = Model().forward(None, positions, "stage", inputs_embeds="rows")
    assert got.tolist() == [0, 1, 2, 3, 4] and (intermediate, embeds) == ("stage", "rows")
    assert Model().forward(input_ids=None, positions=positions[1])[0].tolist() == [5, 6, 7, 8, 9]
    ids, delta = Model().get_mrope_input_positions([7] * 4, [])
    assert ids.tolist() == [[0, 1, 2, 3]] * 3 and ids.dtype == torch.int64 and delta == 0
