# SPDX-License-Identifier: Apache-2.0
"""What every deployment is asked, and the comparison of its answers with those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import MIN_GAP, TOLERANCE
from tests.e2e.server import body, encode_frames, encode_image

Ask = Callable[[dict[str, Any]], httpx.Response]

SIZE = (84, 112)
"""3 x 4 tokens of 28 pixels."""


def _clip(seed: int, frames: int = 12) -> dict[str, Any]:
    return encode_frames(synthetic_clip(frames, SIZE, moving=0.3, noise=2, seed=seed))[0]


def questions() -> dict[str, dict[str, Any]]:
    """Requests by name: what the server does by itself, what a request may set, media of all kinds, a text."""
    clip, other = _clip(700), _clip(701, 9)
    picture = encode_image(synthetic_clip(1, SIZE, "noise", seed=702)[0])
    return {
        "text": body(["How many people ride their bikes?"]),
        "the server's settings": body([clip, "What moves?"]),
        "the same clip again": body([clip, "Why does it stop?"]),
        "rate 0.9": body([other, "What moves?"], mm_processor_kwargs={"evs_rate": 0.9}),
        "nothing dropped": body([clip, "What moves?"], mm_processor_kwargs={"evs_rate": 0}),
        "paper, sequential": body(
            [other, "Where does it go?"],
            mm_processor_kwargs={"evs_selection": "paper", "evs_positions": "sequential", "evs_encoder": "full"},
        ),
        "threshold": body([clip, "Answer with yes or no."], mm_processor_kwargs={"evs_threshold": 20}),
        "two clips and a picture": body([picture, clip, "Compare ", other, "Which one is longer?"]),
    }


def conversation(turns: int = 3) -> dict[str, dict[str, Any]]:
    """The turns of a conversation about a stream, each with all that came before."""
    messages: list[dict[str, Any]] = []
    requests = {}
    for turn in range(turns):
        content = [_clip(710 + turn, 8), {"type": "text", "text": f"What happens now, {turn}?"}]
        messages = [*messages, {"role": "user", "content": content}]
        request = body([], max_tokens=8, mm_processor_kwargs={"evs_stream": True})
        requests[f"stream, turn {turn}"] = {**request, "messages": messages}
        messages = [*messages, {"role": "assistant", "content": f"Something of kind {turn}."}]
    return requests


@dataclass(frozen=True)
class Said:
    """One answer: the prompt as the server laid it out, the tokens, and the logprobs of each step by token."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]

    @property
    def gap(self) -> float:
        """How far apart the two best tokens of a step are at least."""
        best = (sorted(step.values())[-2:] for step in self.logprobs)
        return min(upper - lower for lower, upper in best)


def said(response: httpx.Response) -> Said:
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    steps = [
        {int(each["token"].removeprefix("token_id:")): each["logprob"] for each in [step, *step["top_logprobs"]]}
        for step in choice["logprobs"]["content"]
    ]
    assert len(steps) == len(choice["token_ids"])
    return Said(tuple(answer["prompt_token_ids"]), tuple(choice["token_ids"]), tuple(steps))


def answers(ask: Ask, requests: Mapping[str, dict[str, Any]], at_once: int = 1) -> dict[str, Said]:
    """The answers by the requests' names, asked in order or `at_once` of them at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(requests, map(said, pool.map(ask, requests.values())), strict=True))


def difference(one: Said, other: Said) -> float:
    """The largest difference of a logprob that both report.

    Raises:
        AssertionError: The prompts or the tokens are not the same, or no logprob is reported by both.
    """
    assert one.prompt == other.prompt, f"prompts of {len(one.prompt)} and {len(other.prompt)} tokens"
    assert one.tokens == other.tokens
    pairs = list(zip(one.logprobs, other.logprobs, strict=True))
    assert all(token in mine and token in yours for token, (mine, yours) in zip(one.tokens, pairs))
    return max(abs(mine[token] - yours[token]) for mine, yours in pairs for token in mine.keys() & yours.keys())


def compare(found: Mapping[str, Said], reference: Mapping[str, Said]) -> float:
    """All answers are those of the reference; the largest difference of a logprob."""
    worst = 0.0
    for name, answer in found.items():
        expected = reference[name]
        assert expected.gap > MIN_GAP, f"{name!r} is nearly tied in one process (gap {expected.gap:.1e}): use another"
        try:
            here = difference(answer, expected)
        except AssertionError as error:
            raise AssertionError(f"{name!r}: {error}") from None
        assert here <= TOLERANCE, f"{name!r}: a logprob differs by {here:.1e}"
        worst = max(worst, here)
    return worst
