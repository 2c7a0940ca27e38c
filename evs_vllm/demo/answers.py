# SPDX-License-Identifier: Apache-2.0
"""The part of the demo that shows answers: a small trained model, clips drawn on the spot, one server, three rates."""

import secrets
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from evs_vllm.demo import Launcher, say
from evs_vllm.serving import Answer, ask, data_url, video_part
from evs_vllm.text import table
from evs_vllm.train.codec import to_mp4
from evs_vllm.train.synthetic import TASKS, Example, SceneSettings, make_example

RATES = (0.0, 0.75, 0.9)
SHOWN = 10
"""Questions that are shown; of more, only how many were answered right."""

SERVE = [
    *("--evs-rate", "0.75", "--evs-request-overrides", "any", "--enforce-eager", "--max-num-seqs", "4"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
]
"""Words of ``vllm serve``: requests may ask for any rate, also for none."""


def trained_model() -> Path:
    """The folder of the model that ``python -m bench.quality.demo_model`` has trained, and measures."""
    return Path(str(files("evs_vllm.demo"))) / "model"


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


def ask_trained_model(launcher: Launcher, count: int, words: Sequence[str]) -> list[str]:
    """Serves the trained model and asks it about new clips.

    Args:
        launcher: How servers are started.
        count: How many clips.
        words: Further words of ``vllm serve``.

    Returns:
        Lines with questions and answers.

    Raises:
        EVSError: The server does not start or answer.
    """
    seed, model = new_seed(), trained_model()
    name = f"{model.parent.name}/{model.name}"
    say(f"\nmodel     {name}, trained to answer questions about drawn clips; these are new (seed {seed})")
    clips = [(example, encode(example)) for example in draw(count, seed)]
    say(f"server    vllm serve {name} {' '.join(SERVE[:4])}")
    with launcher.serve("answers", [str(model), *SERVE, *words]) as url:
        asked = ask_all(url, str(model), clips)
    return report(asked)


def encode(example: Example) -> dict[str, Any]:
    """The clip as H.264, as a part of a request."""
    return video_part(data_url(to_mp4(example.frames, example.fps)))


def ask_all(url: str, model: str, clips: Sequence[tuple[Example, dict[str, Any]]]) -> list[Asked]:
    """Sends every clip (with its part of the request) at every rate in the ordinary OpenAI request."""
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
