# SPDX-License-Identifier: Apache-2.0
"""The part of the demo that shows answers: a small trained model, clips drawn on the spot, one server, three rates."""

import base64
import secrets
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from evs_vllm.cli._client import Answer, ask
from evs_vllm.cli._text import table
from evs_vllm.train.codec import to_mp4
from evs_vllm.train.synthetic import TASKS, Example, SceneSettings, make_example

MODEL = Path(str(files("evs_vllm"))) / "demo_model"
"""Made by ``python -m bench.quality.demo_model``, which also measures it."""

RATES = (0.0, 0.75, 0.9)
SHOWN = 10
"""Questions that are shown; of more, only how many were answered right."""

SERVE = [
    *("--evs-rate", "0.75", "--evs-request-overrides", "any", "--enforce-eager", "--max-num-seqs", "4"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
]
"""Words of ``vllm serve``: requests may ask for any rate, also for none."""


class Asked(NamedTuple):
    """One clip, and what the server answered at each of `RATES`."""

    example: Example
    answers: tuple[Answer, ...]

    def right(self, number: int) -> bool:
        return self.answers[number].text.strip() == self.example.answer


def draw(count: int, seed: int) -> list[Example]:
    """Clips with a question each, the tasks in turn; the same seed gives the same."""
    scenes = [SceneSettings(tasks=(task,)) for task in TASKS]
    return [make_example(scenes[number % len(TASKS)], [seed, number]) for number in range(count)]


def new_seed() -> int:
    """One that no run of training had."""
    return secrets.randbelow(900_000) + 100_000


def as_url(example: Example) -> str:
    """The clip as H.264 in a ``data:`` URL."""
    return f"data:video/mp4;base64,{base64.b64encode(to_mp4(example.frames, example.fps)).decode()}"


def ask_all(url: str, model: str, clips: Sequence[tuple[Example, str]], say: Callable[[str], None]) -> list[Asked]:
    """Sends every clip (with its URL) at every rate in the ordinary OpenAI request."""
    asked = []
    for number, (example, video) in enumerate(clips, 1):
        answers = (
            ask(url, model, video, example.question, 8, {"mm_processor_kwargs": {"evs_rate": rate}}) for rate in RATES
        )
        asked.append(Asked(example, tuple(answers)))
        if number % 20 == 0:
            say(f"          {number} clips asked about")
    return asked


def report(asked: Sequence[Asked]) -> list[str]:
    """Questions and answers side by side, with prompt tokens and how many are right."""
    rows = [("", "right answer", *(f"rate {rate:g}" for rate in RATES))]
    for one in asked[:SHOWN]:
        given = (
            answer.text.strip() + ("" if one.right(number) else " (wrong)") for number, answer in enumerate(one.answers)
        )
        rows.append((one.example.question, one.example.answer, *given))
    tokens = (sum(one.answers[number].prompt_tokens for one in asked) / len(asked) for number in range(len(RATES)))
    rows.append(("prompt tokens, mean", "", *(f"{mean:.0f}" for mean in tokens)))
    rights = (sum(one.right(number) for one in asked) for number in range(len(RATES)))
    rows.append(("right", "", *(f"{right} of {len(asked)}" for right in rights)))
    return table(rows, gap="   ")
