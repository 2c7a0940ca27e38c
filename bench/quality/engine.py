# SPDX-License-Identifier: Apache-2.0
"""Asks a model of the quality lab through a vLLM engine with the plugin: the same clips, questions and rates."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from evs_vllm.train.data import Video, as_item
from evs_vllm.train.synthetic import Example

LONGEST_ANSWER = 8
"""Tokens; right answers have fewer."""


def ask_engine(checkpoint: Path, examples: Sequence[Example], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Asks all questions at each rate, the rate by request, in a process of its own (vLLM binds it to cores).

    Returns:
        For each rate: `right`, question by question, and the mean of the prompt's tokens.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_ask, checkpoint, examples, rates).result()


def _ask(checkpoint: Path, examples: Sequence[Example], rates: Sequence[float]) -> list[dict[str, Any]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        # The whole tower, which is what transformers computes when it is asked for the same.
        additional_config={"evs": {"rate": 0.75, "encoder": "full", "request_overrides": "any"}},
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=32,
        enforce_eager=True,
        seed=0,
    )
    prompts = [_prompt(llm.get_tokenizer(), as_item(example)) for example in examples]
    told = []
    for rate in rates:
        outputs = llm.generate(
            [{**prompt, "mm_processor_kwargs": {"evs_rate": rate}} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER),
            use_tqdm=False,
        )
        right = [out.outputs[0].text == example.answer for out, example in zip(outputs, examples, strict=True)]
        tokens = [len(out.prompt_token_ids) for out in outputs]
        told.append({"right": "".join("1" if r else "0" for r in right), "prompt_tokens": sum(tokens) / len(tokens)})
    return told


def _prompt(tokenizer: Any, item: dict[str, Any]) -> dict[str, Any]:
    """What vLLM takes of an item of the training data: all but the answer."""
    text = tokenizer.apply_chat_template(item["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": {"video": [_frames(video) for video in item["videos"]]}}


def _frames(video: Video) -> tuple[Any, dict[str, Any]]:
    return video.frames, {
        "fps": video.fps,
        "total_num_frames": video.total,
        "duration": video.total / video.fps,
        "frames_indices": list(video.indices),
        "do_sample_frames": False,
    }
