# SPDX-License-Identifier: Apache-2.0
"""Sessions, requests that take in prompts one after the other: what they are made of, their reference, a driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.harness import MIN_GAP, TOLERANCE, Engine, Request, measured
from tests.reference.hf import Clip, Reference, Result

CLOSE = "<|im_end|>\n"
"""What an input begins with that comes after an answer: vLLM drops the last token of an answer, as an end token."""


@dataclass
class Turn:
    """One input of a session, with the reference's answer to all up to here, fed at once."""

    text: str
    clips: Sequence[Clip]
    answer: Result
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to_vllm(self, before: str | None) -> dict[str, Any]:
        kwargs = self.kwargs if before is None else {**self.kwargs, "evs_after": before}
        prompt = Request(self.text, self.clips, kwargs).to_vllm()
        return prompt if self.clips else {"prompt": self.text}


def answered(ref: Reference, inputs: Sequence[tuple[str, Sequence[Clip]]], length: int, **kwargs: Any) -> list[Turn]:
    """What the reference answers to each input after those before, or [] where two tokens are nearly tied."""
    ids: list[int] = []
    clips: list[Clip] = []
    turns = []
    for text, new in inputs:
        ids += ref.tokenizer(ref.spelled(text))["input_ids"]
        clips += new
        result = ref.generate(ids, clips, length)
        if result.gap <= MIN_GAP:
            return []
        turns.append(Turn(ref.spelled(text), new, result, kwargs))
        ids += result.tokens[:-1]
    return turns


def difference(tokens: list[int], logprobs: Sequence[dict[int, Any]], answer: Result) -> float:
    """The largest difference of a reported logprob from the reference's; the tokens are the same."""
    assert tokens == answer.tokens
    steps = zip(logprobs, answer.logprobs, strict=True)
    largest = max(abs(one.logprob - float(row[token])) for seen, row in steps for token, one in seen.items())
    measured.append(largest)
    return largest


@dataclass
class Session:
    """A session of an engine inside this process, driven as vLLM's `AsyncLLM` drives one."""

    engine: Engine
    name: str
    before: str | None = None
    chained: bool = True
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    waiting: int = 0
    """How many inputs have no whole answer yet."""

    def _send(self, prompt: Any, length: int, resumable: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        inside = self.engine.llm.llm_engine
        kind = RequestOutputKind.DELTA
        params = SamplingParams(temperature=0, max_tokens=length, logprobs=5, ignore_eos=True, output_kind=kind)
        request = inside.input_processor.process_inputs(
            self.name, prompt, params, inside.get_supported_tasks(), resumable=resumable
        )
        request.external_req_id = self.name
        inside.output_processor.add_request(request, None, None, 0, None)
        # As between two processes: the engine core adds to the lists of a session, and so does its client.
        sent = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
        inside.engine_core.add_request(sent)
        return sent

    def add(self, turn: Turn, length: int | None = None) -> Any:
        """Sends an input, with at most `length` tokens of answer, and returns what it was made into."""
        (prompt,) = self.engine.llm.llm_engine.renderer.render_cmpl([turn.to_vllm(self.before)])
        if turn.clips and self.chained:
            self.before = prompt["mm_hashes"]["video"][-1]
        self.waiting += 1
        return self._send(prompt, length or len(turn.answer.tokens), resumable=True)

    def take(self) -> tuple[list[int], list[dict[int, Any]]]:
        """The answers since."""
        taken, self.tokens, self.logprobs = (self.tokens, self.logprobs), [], []
        return taken

    def check(self, turn: Turn) -> None:
        assert difference(*self.take(), turn.answer) <= TOLERANCE

    def close(self) -> None:
        """Says that no input follows."""
        self._send({"prompt_token_ids": [0]}, 1, resumable=False)
        self.engine.llm.llm_engine.step()


def step(engine: Engine, sessions: Sequence[Session]) -> None:
    """One step of the engine; its outputs go to the sessions."""
    by_name = {session.name: session for session in sessions}
    for output in engine.llm.llm_engine.step():
        session, (part,) = by_name[output.request_id], output.outputs
        session.tokens += part.token_ids
        session.logprobs += part.logprobs or []
        session.waiting -= part.finish_reason is not None


def answer(engine: Engine, sessions: Sequence[Session]) -> None:
    """Steps until every session has answered all that it was sent."""
    for _ in range(1000):
        if not any(session.waiting for session in sessions):
            return
        step(engine, sessions)
    raise AssertionError("the engine does not answer")


def held_by(engine: Engine) -> dict[str, Any]:
    """What an engine holds for requests; nothing where none is left."""
    inside = engine.llm.llm_engine
    scheduler = inside.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "requests": sorted(scheduler.requests),
        "runner": sorted(engine.runner.requests),
        "queues": [len(scheduler.running), len(scheduler.waiting), len(scheduler.kv_holding_waiting)],
        "waiting for input": scheduler.num_waiting_for_streaming_input,
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "encoder": sorted(name for name, users in scheduler.encoder_cache_manager.cached.items() if users),
        "outputs": sorted(inside.output_processor.request_states),
        "names": sorted(inside.output_processor.external_req_ids),
    }
