# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with a pruning rate for each mini-batch, and evaluation at several rates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from evs_vllm import hf
from evs_vllm.errors import ConfigError, UnsupportedError
from evs_vllm.families.qwen2_vl import PIXELS
from evs_vllm.train.data import IGNORED
from evs_vllm.train.rates import RateSampler, RateSettings

RATES_FILE = "evs_rates.json"
"""The state of the rates' generator, in every checkpoint."""


def answers(model: Any, batch: Mapping[str, Any], rate: float, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers the questions of a batch at a pruning rate; call it without gradients.

    Every label token has to be the likeliest one after those before it, which is to say that greedy decoding gives
    exactly the answer.

    Args:
        model: A model with EVS enabled, with `served_positions`.
        batch: What `ChatCollator` makes, on the model's device.
        rate: The rate.
        **options: Further request keys, such as ``evs_positions``.

    Returns:
        (B,) bool, whether row by row the answer is right, and the loss.
    """
    out = model(**batch, evs_rate=rate, **options)
    labels = batch["labels"]
    if batch.get(PIXELS) is not None:
        labels = hf.last_batch(model).take(labels, IGNORED)
    labels = labels[:, 1:]
    right = (out.logits[:, :-1].argmax(-1) == labels) | (labels == IGNORED)
    return right.all(dim=1), out.loss


class _RateKeeper(TrainerCallback):
    def __init__(self, sampler: RateSampler) -> None:
        self._sampler = sampler

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / RATES_FILE).write_text(json.dumps(self._sampler.state()) + "\n")


class UptrainTrainer(Trainer):
    """Trainer for a model with EVS enabled (`evs_vllm.hf.enable(..., served_positions=True)`).

    The rate, and the selection if `RateSettings.selections` names some, is drawn in `training_step`: once per
    mini-batch, also within gradient accumulation, and on every data-parallel rank the same. Checkpoints hold the
    generator's state, and resuming goes on with it.

    Args:
        rates: What to draw from.
        eval_rates: `evaluate` answers the evaluation data at each of these.
        **kwargs: As for Trainer.

    Raises:
        UnsupportedError: EVS is not enabled on the model, or one process has several GPUs (``DataParallel`` copies the
            model in a way that loses EVS).
    """

    def __init__(self, *, rates: RateSettings, eval_rates: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:
            raise UnsupportedError(
                f"One process sees {self.args.n_gpu} GPUs. Start one process per GPU (torchrun --nproc-per-node "
                f"{self.args.n_gpu} $(which evs-vllm) uptrain ...), or show it one (CUDA_VISIBLE_DEVICES=0)."
            )
        hf.last_plans(self.model)  # raises for a model without EVS, which would ignore the rate without a word
        self.rates = RateSampler(rates)
        self.drawn: list[float] = []
        self._eval_rates = tuple(eval_rates)
        self._unlogged = 0
        self.add_callback(_RateKeeper(self.rates))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's; resuming also restores the rates' generator.

        Raises:
            ConfigError: There is no checkpoint, it holds no such state, or rates were drawn otherwise.
        """
        if resume_from_checkpoint:
            folder: Any = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            if folder is None or not (Path(folder) / RATES_FILE).is_file():
                raise ConfigError(
                    f"No checkpoint of uptraining (with {RATES_FILE}) in {folder or self.args.output_dir}."
                )
            self.rates.restore(json.loads((Path(folder) / RATES_FILE).read_text()))
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Checkpoints have the names of the released files (visual.*), modules those of transformers 5 (model.visual.*).
        # Trainer 5.19 compares them raw, warns about missing keys and trains on from the weights it started with;
        # from_pretrained renames.
        target = self.model if model is None else model
        if self.is_fsdp_enabled or not hasattr(type(target), "from_pretrained") or hasattr(target, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        rate, selection = self.rates.draw(), self.rates.draw_selection()
        self.drawn.append(rate)
        asked = {"evs_rate": rate} if selection is None else {"evs_rate": rate, "evs_selection": selection}
        return super().training_step(model, {**inputs, **asked}, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        fresh = self.drawn[self._unlogged :]
        if "loss" in logs and fresh:
            logs["evs_rate"] = round(sum(fresh) / len(fresh), 4)
            self._unlogged = len(self.drawn)
        super().log(logs, *args, **kwargs)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answers every evaluation example at every rate.

        Returns:
            ``eval_accuracy_<rate>`` (share of right answers) and ``eval_loss_<rate>``, and ``eval_loss`` of the first.
        """
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        for rate in self._eval_rates:
            right, losses = [], []
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    good, loss = answers(model, inputs, rate)
                right.append(self.accelerator.gather_for_metrics(good))
                losses.append(self.accelerator.gather_for_metrics(loss.expand(len(good)).contiguous()))
            metrics[f"{metric_key_prefix}_accuracy_{rate:g}"] = torch.cat(right).float().mean().item()
            metrics[f"{metric_key_prefix}_loss_{rate:g}"] = torch.cat(losses).float().mean().item()
        if self._eval_rates:
            metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_loss_{self._eval_rates[0]:g}"]
        model.train(was_training)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
