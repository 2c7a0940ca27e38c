# SPDX-License-Identifier: Apache-2.0
"""Step "numbers": whether the engine on the device answers what an independent reference does, on tiny models.

- Prompt, tokens and logprobs of each row, against transformers in fp32 on the CPU (`tests.reference`).
- FlashAttention as the tower's reuse calls it, against plain attention in fp32, for every seventh sequence of a call.
- Compiled models with captured graphs against eager ones.

With ``--device cpu`` the engine runs in fp32 and has to agree as the tests ask for; on a GPU it runs in bf16.
"""

import itertools
import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tower's attention must be in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch

from bench.gpu.step import Asked, asked
from evs_vllm.testing import synthetic_clip

EVERY = 7
"""One in so many sequences of a call of FlashAttention is computed again."""

ATTENTION_ERROR = 2e-2
"""Largest error of an attention output, as a share of the largest value in it: bf16 has 8 bits."""

LOGPROB_ERROR = {"cuda": 0.3, "cpu": 1e-4}
"""Largest difference of a token's logprob from fp32, while the tokens are the same. On a CPU bf16 once gave 0.15."""

TOKENS = 16
QUESTION = "What moves?"


@dataclass(frozen=True)
class Row:
    """One request: its name, the reference's settings, and what it asks of EVS."""

    name: str
    settings: Any
    kwargs: dict[str, Any]


def rows(reuses: bool) -> list[Row]:
    """The requests of a family whose tower can reuse keys and values, or not."""
    from tests.reference.hf import Settings
    from tests.reference.tower import TowerSettings

    found = [
        Row("nothing dropped", Settings(), {"evs_rate": 0}),
        Row("0.75, full tower", Settings(0.75), {"evs_rate": 0.75, "evs_encoder": "full"}),
        Row(
            "0.75, full tower, sequential",
            Settings(0.75, positions="sequential"),
            {"evs_rate": 0.75, "evs_encoder": "full", "evs_positions": "sequential"},
        ),
    ]
    if reuses:
        found.append(Row("0.75, reuse", TowerSettings(0.75), {"evs_rate": 0.75, "evs_encoder": "reuse"}))
    return found


ENGINES = (
    ("qwen2_5_vl", "eager"),
    ("qwen3_vl", "eager"),
    ("internvl", "eager"),
    ("internvl", "compiled"),
    ("qwen2_5_vl", "compiled"),
)
SMOKE_ENGINES = (("qwen2_5_vl", "eager"),)
REUSES = ("qwen2_5_vl", "qwen3_vl")
"""Families whose tower can reuse keys and values; on a GPU its attention takes FlashAttention's variable lengths."""


class Checked:
    """Stands in for `evs_vllm.engine.attention.flash_attention`, and computes a part of each result again."""

    def __init__(self, stock: Any) -> None:
        self.stock, self.calls, self.worst = stock, 0, 0.0

    def __call__(self, attention: Any, schedule: Any, form: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        out: torch.Tensor = self.stock(attention, schedule, form, query, key, value)
        self.calls += 1
        k, v = (schedule.take(x, form.key_tokens).float() for x in (key, value))
        queries, keys = (list(itertools.pairwise(x.tolist())) for x in (form.query_starts, form.key_starts))
        for i in range(0, len(queries), EVERY):
            of_queries, of_keys = slice(*queries[i]), slice(*keys[i])
            scores = torch.einsum("qhd,khd->hqk", query[of_queries].float(), k[of_keys]) * attention.scale
            want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[of_keys])
            error = (out[of_queries].float() - want).abs().max() / want.abs().max()
            self.worst = max(self.worst, float("inf") if error.isnan() else float(error))
        return out


def main(run: Asked) -> None:
    """Starts the engines one after the other, and compares."""
    from evs_vllm.engine import attention

    checked = Checked(attention.flash_attention)
    attention.flash_attention = checked
    head = ("engine", "row", "prompt tokens", "of the reference", "tokens the same", "largest difference of a logprob")
    run.findings.table("Answers against the reference", *head)
    eager: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family, how in SMOKE_ENGINES if run.smoke else ENGINES:
            if run.late:
                run.findings.note(f"Left out for want of time: {family}, {how}.")
                continue
            checked.calls, checked.worst = 0, 0.0
            try:
                got, wanted = answers(run, Path(folder) / family, family, how)
            except Exception as error:  # the other engines may still work
                traceback.print_exc()
                run.findings.problem(f"{family}, {how}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            if how == "eager":
                eager[family] = got
            against = eager.get(family, wanted) if how == "compiled" else wanted
            label = f"{family}, {how}{', against eager' if how == 'compiled' and family in eager else ''}"
            compare(run, label, [row.name for row in rows(family in REUSES)], got, against)
            if run.on_gpu:
                judge_attention(run, f"{family}, {how}", checked, family in REUSES)


def judge_attention(run: Asked, label: str, checked: Checked, expected: bool) -> None:
    """Says what FlashAttention gave, and whether it was called at all."""
    run.findings.note(f"{label}: {checked.calls} calls of FlashAttention by reuse, largest error {checked.worst:.1e}.")
    if expected and not checked.calls:
        run.findings.problem(f"{label}: the tower's reuse did not go through FlashAttention")
    if not checked.worst < ATTENTION_ERROR:
        run.findings.problem(f"{label}: FlashAttention differs from plain attention by {checked.worst:.1e}")


@dataclass
class Answer:
    """What came back: the prompt's token ids, those of the answer, and the logprob of each of these."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def answers(run: Asked, folder: Path, family: str, how: str) -> tuple[list[Answer], list[Answer]]:
    """The engine's answers to the rows of a family, and the reference's."""
    from tests.e2e.harness import VIDEO, Request, chat, start_engine, stop_engine
    from tests.families import registry
    from tests.reference.hf import Clip
    from tests.reference.tower import TowerReference

    case = registry.FAMILIES[family]
    if not folder.is_dir():
        registry.make_model(folder, family)
    reference = (TowerReference if family in REUSES else case.load_reference())(folder)
    frames = synthetic_clip(9, case.facts.frame_size, noise=2, seed=3)
    options: dict[str, Any] = {"limit_mm_per_prompt": dict(case.facts.limits), "enforce_eager": how == "eager"}
    if run.on_gpu:
        options |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.1}
    if how == "compiled":
        options["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    engine = start_engine(folder, {"rate": 0, "encoder": "auto", "request_overrides": "any"}, **options)
    try:
        got, wanted = [], []
        for row in rows(family in REUSES):
            prompt = reference.spelled(chat(getattr(reference, "video", VIDEO), QUESTION))
            request = Request(prompt, [Clip(frames, settings=row.settings)], row.kwargs, TOKENS)
            (output,) = engine.generate([request])
            answer = output.outputs[0]
            chosen = [entries[token].logprob for entries, token in zip(answer.logprobs, answer.token_ids)]
            got.append(Answer(list(output.prompt_token_ids), list(answer.token_ids), chosen))
            result = reference.generate(request.prompt, request.media, TOKENS)
            chosen = [float(step[token]) for step, token in zip(result.logprobs, result.tokens)]
            wanted.append(Answer(result.prompt_ids, result.tokens, chosen))
    finally:
        stop_engine(engine)
    return got, wanted


def compare(run: Asked, label: str, names: Sequence[str], got: Sequence[Answer], want: Sequence[Answer]) -> None:
    """A row of the table for each answer, and a problem for each that differs by more than its dtype explains."""
    for name, own, other in zip(names, got, want, strict=True):
        pairs = zip(own.tokens, other.tokens, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(own.tokens))
        # The first token that differs was chosen after the same ones, so its logprob can be compared, too.
        differences = [abs(a - b) for a, b in zip(own.logprobs[: same + 1], other.logprobs)]
        worst = float(np.max(differences))  # NaN where there is one
        cells = (len(own.prompt), len(other.prompt), f"{same} of {len(own.tokens)}", f"{worst:.1e}")
        run.findings.row(label, name, *cells)
        if own.prompt != other.prompt:
            run.findings.problem(
                f"{label}, {name}: another prompt, of {len(own.prompt)} tokens for {len(other.prompt)}"
            )
        if not worst <= LOGPROB_ERROR[run.device]:
            run.findings.problem(f"{label}, {name}: {same} tokens the same, then logprobs differ by {worst:.1e}")
        if run.device == "cpu" and same < len(own.tokens):
            run.findings.problem(f"{label}, {name}: other tokens from number {same + 1} on")


if __name__ == "__main__":
    main(asked(__doc__))
