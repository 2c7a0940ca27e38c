# SPDX-License-Identifier: Apache-2.0
"""A local benchmark in MVBench's format: clips drawn here, questions with four options, and lmms-eval's task files."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluate.client import Ask, Client
from evs_vllm.serving import Answer, video_part
from evs_vllm.train.synthetic import COLOURS, SceneSettings, write_dataset
from tests.e2e.server import Server, body

ROOT = Path(__file__).resolve().parents[2]

UNITS = 5
"""Of each clip; a unit is 6 tokens."""

LETTERS = string.ascii_uppercase[:4]
NAME = "evs_local"
POST_PROMPT = "Only give the best option.\n"

# MVBench's own questions and scores; only where the data lie is ours.
TASK = f"""
task: {NAME}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {{data}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
metric_list:
  - metric: mvbench_accuracy
    aggregation: !function utils.aggregate
    higher_is_better: true
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
lmms_eval_specific_kwargs:
  default:
    sub_task: {NAME}
    post_prompt: "{{post_prompt}}"
"""
UTILS = """
from pathlib import Path

from lmms_eval.tasks.mvbench.utils import mvbench_aggregate_results as aggregate
from lmms_eval.tasks.mvbench.utils import mvbench_doc_to_text as doc_to_text
from lmms_eval.tasks.mvbench.utils import mvbench_process_results as process_results


def doc_to_visual(doc):
    return [str(Path(__file__).parent / doc["video"])]
"""


@dataclass(frozen=True)
class Question:
    """One line of the data, as MVBench has them."""

    video: Path
    question: str
    candidates: list[str]
    answer: str

    @property
    def text(self) -> str:
        """How MVBench asks, in words of this test's."""
        options = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, self.candidates, strict=True))
        return f"Question:{self.question}\nOption:\n{options}{POST_PROMPT}"

    @property
    def gold(self) -> str:
        return LETTERS[self.candidates.index(self.answer)]


def write_task(folder: Path, count: int) -> list[Question]:
    """Draws clips, asks for a colour with four options each, and writes the files of a task."""
    scene = SceneSettings(units=UNITS, tasks=("first", "last"), texture=None)
    lines = [json.loads(line) for line in write_dataset(folder, count, scene, 11, "mp4").read_text().splitlines()]
    rng = np.random.default_rng(3)
    questions = []
    for line in lines:
        asked, answer = (turn["value"] for turn in line["conversations"])
        others = rng.choice([colour for colour in COLOURS if colour != answer], 3, replace=False)
        options = [str(colour) for colour in rng.permutation([answer, *others])]
        questions.append(Question(folder / line["video"], asked.removeprefix("<video>\n"), options, answer))
    data = [{**vars(question), "video": question.video.name} for question in questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    described = TASK.format(data=folder / "questions.jsonl", post_prompt=POST_PROMPT.replace("\n", "\\n"))
    (folder / f"{NAME}.yaml").write_text(described)
    (folder / "utils.py").write_text(UTILS)
    return questions


def letters_only(tokenizer: object) -> dict[str, list[int]]:
    """Lets a model answer with one of the four letters: one with random weights would never think of it."""
    ids = [tokenizer(letter)["input_ids"] for letter in LETTERS]  # type: ignore[operator]
    assert all(len(tokens) == 1 for tokens in ids)
    return {"allowed_token_ids": [tokens[0] for tokens in ids]}


def asked_plainly(server: Server, question: Question, rate: float, more: dict[str, list[int]]) -> tuple[str, int]:
    """The letter and the prompt's tokens, by a request that is written out here."""
    kwargs = {"evs_rate": rate}
    request = body([video_part(question.video), question.text], 1, mm_processor_kwargs=kwargs, **more)
    response = server.post(request)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def asked_by_the_client(
    server: Server, questions: list[Question], rate: float, more: dict[str, Any], **options: Any
) -> tuple[list[Answer], dict[str, float]]:
    """Answers by the client of bench/evaluate, and by how much the server's counters grew meanwhile."""
    client = Client(server.url + "/v1/", body=more, **{"concurrency": 4, **options})
    asks = []
    for question in questions:
        parts = [{"type": "video", "url": str(question.video)}, {"type": "text", "text": question.text}]
        asks.append(Ask([{"role": "user", "content": parts}], {"max_tokens": 1, "temperature": 0}))
    before = client.counters()
    answers = client.run(asks, {"evs_rate": rate})
    after = client.counters()
    assert before is not None and after is not None
    return answers, {name: after[name] - before[name] for name in before}


def run_command(
    server: Server, tasks: Path, folder: Path, more: dict[str, Any], rates: list[float]
) -> tuple[dict[str, Any], str]:
    """The content of the result file and the table of ``bench/evaluate``, run as a user runs it."""
    settings = {"tasks": [NAME], "task_folders": [str(tasks)], "body": more, "max_tokens": 1}
    (folder / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "bench.evaluate", str(folder / "settings.yaml"), "--url", server.url]
    command += ["--rates", *map(str, rates), "--out", str(folder / "result")]
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "result.svg").stat().st_size > 1000
    return json.loads((folder / "result.json").read_text()), (folder / "result.md").read_text()
