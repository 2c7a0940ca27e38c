# SPDX-License-Identifier: Apache-2.0
"""The bridge to lmms-eval: its tasks and scores, with answers from a server that is asked by `client.Client`.

Importing this imports lmms-eval. vLLM is not needed here, nor is the model.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evaluate.client import Ask, Client, generation_of
from evs_vllm.errors import EVSError
from evs_vllm.serving import Answer

# Some tasks read it while they are imported, and each has a default of its own.
os.environ.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))

from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from loguru import logger


@dataclass
class Scored:
    """A task's answers to its questions, in the order of the questions.

    Attributes:
        metrics: what the task says, by name, in the task's own unit; the first is its main one.
        answers: with their tokens, as the server gave them.
        videos: how many were sent.
    """

    metrics: dict[str, float]
    answers: list[Answer]
    videos: int


class ServedModel(lmms):
    """What lmms-eval takes for a model: every request goes to the server."""

    is_simple = False  # gets chat turns, not a prompt with a list of pictures

    def __init__(self, client: Client, options: Mapping[str, Any], max_tokens: int | None) -> None:
        super().__init__()
        self._client, self._options, self._max_tokens = client, options, max_tokens
        self.answers: dict[int, Answer] = {}
        self.videos = 0

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        asks = [self._ask(request) for request in requests]
        self.videos += sum(ask.videos for ask in asks)
        answers = self._client.run(asks, self._options)
        self.answers.update({request.doc_id: answer for request, answer in zip(requests, answers, strict=True)})
        return [GenerationResult(a.text, TokenCounts(a.prompt_tokens, a.output_tokens)) for a in answers]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise EVSError("this task compares log-likelihoods; a task that generates its answers is needed")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        raise EVSError("this task talks in several rounds; a task with one answer to a question is needed")

    def _ask(self, request: Instance) -> Ask:
        _, doc_to_messages, generation, number, task, split = request.args
        return Ask(doc_to_messages(self.task_dict[task][split][number]), generation_of(generation, self._max_tokens))


class Tasks:
    """The tasks that can be run: those of lmms-eval, and those of further folders of task files."""

    def __init__(self, names: Sequence[str], folders: Sequence[Path], prompts: str) -> None:
        """
        Args:
            names: which will be wanted.
            folders: with YAML files of tasks.
            prompts: which of a task's `lmms_eval_specific_kwargs` are taken; "default" where it has no such.

        Raises:
            EVSError: no such folder or task.
        """
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
        if missing := [str(folder) for folder in folders if not folder.is_dir()]:
            raise EVSError(f"no such task_folders: {', '.join(missing)}")
        paths = [str(folder) for folder in folders]
        # lmms-eval reads some two thousand files to know its own tasks: not where nobody wants one.
        self._manager = TaskManager("WARNING", include_path=paths, include_defaults=False, model_name=prompts)
        if set(names) - set(self._manager.all_tasks):
            self._manager = TaskManager("WARNING", include_path=paths, model_name=prompts)
        if unknown := sorted(set(names) - set(self._manager.all_tasks)):
            first = unknown[0].split("_")[0]
            alike = [name for name in self._manager.all_tasks if name.startswith(first)][:12]
            hint = f"; there are {', '.join(alike)}" if alike else ""
            raise EVSError(f"lmms-eval knows no task {', '.join(unknown)}{hint}. `task_folders` adds tasks of yours")

    def parts(self, name: str) -> list[str]:
        """The tasks that a group stands for; a task stands for itself."""
        entry = self._manager.task_index[name]
        if entry["type"] not in ("group", "tag"):
            return [name]
        members = entry["task"] if entry["task"] != -1 else self._manager._get_config(name)["task"]
        return [part for member in members for part in self.parts(member)]

    def run(
        self, name: str, client: Client, options: Mapping[str, Any], limit: int | None, max_tokens: int | None
    ) -> Scored:
        """Asks a task's questions and has the task score the answers.

        Raises:
            EVSError: the task's data cannot be had, a request failed, or the task could not score.
        """
        model = ServedModel(client, options, max_tokens)
        with _as_evs_error(name):
            results = evaluator.simple_evaluate(
                model, tasks=[name], task_manager=self._manager, limit=limit, bootstrap_iters=0, verbosity="WARNING",
                distributed_executor_backend="torchrun",  # one process; "accelerate" would set up a device for it
            )  # fmt: skip
            order = [metric["metric"] for metric in results["configs"][name]["metric_list"]]
            scores = {key.split(",")[0]: value for key, value in results["results"][name].items()}
            metrics = {metric: float(scores[metric]) for metric in order if _is_number(scores.get(metric))}
        if not metrics:
            raise EVSError(f"{name} gives no score: it may need a judge, or writes a file to be submitted")
        return Scored(metrics, [answer for _, answer in sorted(model.answers.items())], model.videos)


@contextmanager
def _as_evs_error(name: str) -> Iterator[None]:
    """Tasks fail in many ways, some of them leave the process: say which one it was, and go on."""
    try:
        yield
    except EVSError:
        raise
    except (Exception, SystemExit) as error:
        raise EVSError(f"lmms-eval could not run {name}: {type(error).__name__}: {str(error)[:500]}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
