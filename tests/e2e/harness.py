# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests are written in: requests, engines one can look into, the comparison with the reference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.families.processing import metadata_for
from tests.families.registry import FAMILIES
from tests.reference.delta import use_fp32_delta_rule
from tests.reference.hf import Clip, Picture, Reference, Result, Settings, Sound

TOLERANCE = 1e-4
"""Largest allowed difference of a logprob between vLLM and the reference, fp32. Measured: below 3e-5."""

MIN_GAP = 5 * TOLERANCE
"""A case whose two best tokens are closer than this in the reference says nothing, and is refused."""

MAX_TOKENS = 12
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"


def sized(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """A (height, width) given for tokens of 28 x 28 pixels, for as many of those that the family has."""
    side = FAMILIES[family].facts.token_side
    return size[0] // 28 * side, size[1] // 28 * side


measured: list[float] = []
"""Every difference that was compared, for the summary line."""


def chat(*parts: str) -> str:
    return "<|im_start|>user\n" + "".join(parts) + "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Request:
    """One request: a prompt with one placeholder per item of `media`, and what it asks of EVS."""

    prompt: str | list[int]
    media: Sequence[Clip | Picture | Sound]
    mm_processor_kwargs: dict[str, Any] | None = None
    max_tokens: int = MAX_TOKENS
    uuids: dict[str, list[str]] | None = None
    precomputed: Reference | None = None
    """Whose vision tower computes the clips' embeddings beforehand, instead of sending pixels."""
    answer: Result | None = None
    """The reference's, once it was asked."""

    def to_vllm(self) -> dict[str, Any]:
        clips = [m for m in self.media if isinstance(m, Clip)]
        pictures = [m for m in self.media if isinstance(m, Picture)]
        data: dict[str, Any] = {}
        if clips and self.precomputed is not None:
            data["video"] = self.precomputed.embeddings(clips)
        elif clips:
            data["video"] = [(clip.frames, metadata_for(clip.frames, clip.fps)) for clip in clips]
        if pictures:
            data["image"] = [to_pil(picture) for picture in pictures]
        if sounds := [(m.samples, 16000) for m in self.media if isinstance(m, Sound)]:
            data["audio"] = sounds
        key = "prompt" if isinstance(self.prompt, str) else "prompt_token_ids"
        out: dict[str, Any] = {key: self.prompt, "multi_modal_data": data}
        if self.mm_processor_kwargs is not None:
            out["mm_processor_kwargs"] = self.mm_processor_kwargs
        if self.uuids is not None:
            out["multi_modal_uuids"] = self.uuids
        return out


def untied(ref: Reference, make: Callable[[int], list[Request]], first: int = 200) -> list[Request]:
    """What `make` makes of a seed, for one whose requests the reference answers without a near tie, and its answers."""
    for seed in range(first, first + 30):
        requests = make(seed)
        for request in requests:
            request.prompt = ref.spelled(request.prompt)
            request.answer = ref.generate(request.prompt, request.media, request.max_tokens)
            if request.answer.gap <= MIN_GAP:
                break
        else:
            return requests
    raise AssertionError("the reference is nearly tied whatever the clips")


def to_pil(picture: Picture) -> Any:
    from PIL import Image

    return Image.fromarray(picture.pixels)


def ask(
    frames: np.ndarray, settings: Settings | None = None, question: str = "Describe the video.", **kwargs: Any
) -> Request:
    """The commonest request: one clip and a question. `kwargs` are the request's `mm_processor_kwargs`."""
    return Request(chat(VIDEO, question), [Clip(frames, settings=settings or Settings())], kwargs or None)


@dataclass
class Step:
    """What the scheduler gave one request in one step."""

    request_id: str
    computed: int
    scheduled: int


@dataclass(eq=False)
class Engine:
    """A vLLM engine inside this process. `sent` and `steps` record what reached the engine core and the scheduler."""

    llm: Any
    sent: list[Any] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        client = self.llm.llm_engine.engine_core
        scheduler = client.engine_core.scheduler
        add_request, schedule = client.add_request, scheduler.schedule

        def recording_add(request: Any) -> None:
            self.sent.append(request)
            add_request(request)

        def recording_schedule(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            cached = out.scheduled_cached_reqs
            computed = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
            computed |= dict(zip(cached.req_ids, cached.num_computed_tokens))
            for request_id, count in out.num_scheduled_tokens.items():
                self.steps.append(Step(request_id, computed[request_id], count))
            return out

        client.add_request, scheduler.schedule = recording_add, recording_schedule

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def language_model(self) -> Any:
        return self.runner.model.get_language_model().model

    def reset(self) -> None:
        """Forget every cache, so that a test starts from nothing."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache()
        self.sent.clear()
        self.steps.clear()

    def generate(self, requests: Sequence[Request], logprobs: int = 5) -> list[Any]:
        """All requests at once, greedily; vLLM's outputs in the order of the requests."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=r.max_tokens, logprobs=logprobs, ignore_eos=True) for r in requests
        ]
        return self.llm.generate([r.to_vllm() for r in requests], params, use_tqdm=False)

    def metric(self, name: str) -> float:
        """The value of a counter, summed over its labels."""
        found = [m for m in self.llm.get_metrics() if m.name == name]
        assert found, f"no metric {name}"
        return float(sum(m.value for m in found))


class EnginePool:
    """Starts an engine when a test asks for one that differs from the last."""

    def __init__(self, model_dir: Callable[[str], Path]) -> None:
        self.model_dir, self.key, self.engine = model_dir, "", None
        self.failed: dict[str, Exception] = {}

    def get(self, family: str, evs: dict[str, Any] | None = None, **options: Any) -> Engine:
        facts = FAMILIES[family].facts
        options = {"limit_mm_per_prompt": dict(facts.limits), "trust_remote_code": facts.remote_code} | options
        key = repr((family, evs, sorted(options.items())))
        if key in self.failed:  # not again for each of its tests
            raise RuntimeError(f"this engine did not start before: {self.failed[key]}")
        if key != self.key:
            self.close()
            try:
                self.engine, self.key = start_engine(self.model_dir(family), evs, **options), key
            except Exception as error:
                self.failed[key] = error
                raise
        self.engine.reset()
        return self.engine

    def close(self) -> None:
        engine, self.engine, self.key = self.engine, None, ""
        if engine is not None:
            stop_engine(engine)


def start_engine(directory: Path, evs: dict[str, Any] | None = None, **options: Any) -> Engine:
    from vllm import LLM

    use_fp32_delta_rule()
    defaults: dict[str, Any] = {
        "max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 4096, "enforce_eager": True,
        "dtype": "float32", "disable_log_stats": False, "limit_mm_per_prompt": {"image": 4, "video": 4}, "seed": 0,
    }  # fmt: skip
    if evs is not None:
        # The reference runs the whole tower; test_reuse.py compares the other encoder with a reference of its own. And
        # it selects as the paper says, unless a test asks it for another selection, as test_selections.py does.
        whole = {"encoder": "full", "selection": "paper", **evs} if isinstance(evs, dict) else evs
        defaults["additional_config"] = {"evs": whole}
    return Engine(LLM(str(directory), **(defaults | options)))


def stop_engine(engine: Engine) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm.llm_engine.engine_core.shutdown()
    engine.llm = None
    gc.collect()
    cleanup_dist_env_and_memory()


def expected(reference: Reference, request: Request) -> Result:
    """The reference's answer, refused if its greedy choice is too close to call."""
    if request.answer is None:
        request.answer = reference.generate(request.prompt, request.media, request.max_tokens)
    result = request.answer
    assert result.gap > MIN_GAP, f"this case is nearly tied in the reference (gap {result.gap:.4f}): use another"
    return result


def check(output: Any, result: Result) -> None:
    """vLLM's output is the reference's: prompt, tokens, and every reported logprob."""
    assert list(output.prompt_token_ids) == result.prompt_ids, (
        f"the prompt has {len(output.prompt_token_ids)} tokens, the reference {len(result.prompt_ids)}"
    )
    completion = output.outputs[0]
    difference = max(
        abs(entry.logprob - float(result.logprobs[step][token]))
        for step, entries in enumerate(completion.logprobs)
        for token, entry in entries.items()
        if list(completion.token_ids[:step]) == result.tokens[:step]
    )
    assert list(completion.token_ids) == result.tokens, f"other tokens; largest logprob difference {difference:.2e}"
    assert difference <= TOLERANCE, f"same tokens, but a logprob differs by {difference:.2e}"
    measured.append(difference)


@contextmanager
def recorded_positions(engine: Engine) -> Iterator[list[Any]]:
    """(dtype, (3, n) values) of every positions tensor that enters the language model's first layer."""
    calls: list[Any] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        positions = kwargs["positions"] if "positions" in kwargs else args[0]
        calls.append((positions.dtype, positions.detach().clone().numpy()))

    handle = engine.language_model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def check_positions(seen: list[Any], result: Result) -> None:
    """What `recorded_positions` saw of one request is the reference's, as integers."""
    (dtype, prefill), *decoding = seen
    count = len(result.prompt_ids)
    assert dtype == torch.int64 and prefill.shape[0] == 3
    np.testing.assert_array_equal(prefill[:, :count], result.positions)
    for step, (dtype, ids) in enumerate(decoding[: len(result.tokens) - 1]):
        assert dtype == torch.int64
        following = result.following + step
        assert ids[:, 0].tolist() == [following] * 3, f"step {step}"


def run_and_check(engine: Engine, reference: Reference, requests: Sequence[Request]) -> list[tuple[Any, Result]]:
    """All requests at once through the engine, each compared with the reference."""
    for request in requests:
        request.prompt = reference.spelled(request.prompt)
    outputs = engine.generate(requests)
    results = [expected(reference, request) for request in requests]
    for output, result in zip(outputs, results, strict=True):
        check(output, result)
    return list(zip(outputs, results))
