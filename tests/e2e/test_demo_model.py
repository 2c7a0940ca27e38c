# SPDX-License-Identifier: Apache-2.0
"""The trained model of the demo: right answers about unseen clips through the engine, and those of transformers."""

import pytest
import torch

from evs_vllm import hf
from evs_vllm.demo.answers import trained_model
from evs_vllm.train.data import ChatCollator, as_item
from evs_vllm.train.synthetic import SceneSettings, make_example
from evs_vllm.train.trainer import answers
from tests.e2e.harness import VIDEO, Request, chat, start_engine, stop_engine
from tests.reference.hf import Clip

pytestmark = pytest.mark.vllm

RATES = (0.0, 0.5, 0.75, 0.9)
EXAMPLES = [make_example(SceneSettings(h264=(23, 23)), [31, number]) for number in range(140)]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
"""What the chat template puts before the first turn."""


@pytest.fixture(scope="module")
def served(engines):
    """By rate, whether the engine answers each question right."""
    from vllm import SamplingParams

    engines.close()
    settings = {"rate": 0.75, "selection": "learned", "request_overrides": "any"}  # what the demo serves
    engine = start_engine(trained_model(), settings, max_model_len=1024)
    right = {}
    try:
        for rate in RATES:
            requests = [
                Request(SYSTEM + chat(VIDEO, example.question), [Clip(example.frames)], {"evs_rate": rate})
                for example in EXAMPLES
            ]
            outputs = engine.llm.generate(
                [request.to_vllm() for request in requests],
                SamplingParams(temperature=0, max_tokens=8),
                use_tqdm=False,
            )
            encode = engine.llm.get_tokenizer().encode
            for output, example in zip(outputs, EXAMPLES, strict=True):
                text = len(encode(SYSTEM + chat("", example.question))) + 2  # and the two tokens around the clip
                assert len(output.prompt_token_ids) == text + round(192 * (1 - rate))
            right[rate] = [o.outputs[0].text == example.answer for o, example in zip(outputs, EXAMPLES, strict=True)]
    finally:
        stop_engine(engine)
    return right


def test_it_answers_right(served):
    share = {rate: sum(right) / len(EXAMPLES) for rate, right in served.items()}
    assert share[0.75] >= 0.95 and min(share.values()) >= 0.93, share


def test_transformers_answers_the_same(served):
    """At least 99.5 % of all questions are answered right by both or wrong by both."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained_model()).eval()
    hf.enable(model, 0, served_positions=True)
    collate = ChatCollator(AutoProcessor.from_pretrained(trained_model()))
    for rate in RATES:
        right = []
        for start in range(0, len(EXAMPLES), 28):
            with torch.no_grad():
                right += answers(model, collate([as_item(e) for e in EXAMPLES[start : start + 28]]), rate)[0].tolist()
        same = sum(one == other for one, other in zip(right, served[rate], strict=True))
        assert same >= 0.995 * len(EXAMPLES), (rate, same)
