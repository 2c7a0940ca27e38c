# SPDX-License-Identifier: Apache-2.0
"""A YAML file -> an uptrained checkpoint: settings, model (full or LoRA), data, Trainer.

Imports of transformers and peft stand in the functions that need them: reading a recipe is quick and says what is wrong
with it before anything is loaded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from evs_vllm.errors import ConfigError, EVSError, UnsupportedError
from evs_vllm.train.rates import RateSettings
from evs_vllm.train.synthetic import SceneSettings

T = TypeVar("T")

LANGUAGE_MODEL = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
"""The modules that LoRA adapts by default: every linear layer of the language model's blocks."""

_OURS = {"remove_unused_columns": False, "label_names": ["labels"]}


@dataclass(frozen=True)
class DataSettings:
    """Where examples come from: JSONL files (`evs_vllm.train.data`), or clips that are drawn as they are needed.

    Attributes:
        train, eval: JSONL files, relative to the working directory.
        fps, max_frames: Frames a second that are taken of a video, and at most how many.
        max_length: Longest sequence in tokens, unpruned; a longer one stops the run.
        synthetic: What drawn clips look like, instead of `train` and `eval`.
        train_clips, eval_clips: How many are drawn.
        seed: Seed of the training clips; the clips of the evaluation are others.
    """

    train: str | None = None
    eval: str | None = None
    fps: float = 2.0
    max_frames: int = 64
    max_length: int | None = None
    synthetic: SceneSettings | None = None
    train_clips: int = 10000
    eval_clips: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.train is None) == (self.synthetic is None):
            raise ConfigError("data needs either 'train' (a JSONL file) or 'synthetic' (settings of drawn clips).")
        if self.synthetic is not None and self.eval is not None:
            raise ConfigError("data.eval is a file; with data.synthetic set eval_clips.")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA by peft. Further keys of ``peft.LoraConfig`` go into `more`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = LANGUAGE_MODEL
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        model: Folder (or hub name) of a checkpoint of one of the classes in `evs_vllm.hf.classes`.
        data: The examples.
        trainer: ``transformers.TrainingArguments`` by name; ``output_dir`` has to be there.
        rates: What rates are drawn from.
        evs: Further EVS options (positions, min_tokens_per_unit, max_tokens), the same for every batch.
        eval_rates: Rates at which the evaluation data are answered.
        lora: LoRA instead of full fine-tuning.
        freeze_vision: Leave the vision tower as it is (full fine-tuning).
        dtype: Weight dtype, a torch name such as `bfloat16`.

    Raises:
        ConfigError: Something is missing, unknown or not allowed.
    """

    model: str
    data: DataSettings
    trainer: Mapping[str, Any]
    rates: RateSettings = field(default_factory=RateSettings)
    evs: Mapping[str, Any] = field(default_factory=dict)
    eval_rates: tuple[float, ...] = (0.0, 0.75, 0.9)
    lora: LoraSettings | None = None
    freeze_vision: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_rates", tuple(self.eval_rates))
        if not self.trainer.get("output_dir"):
            raise ConfigError("trainer.output_dir is missing: where checkpoints go.")
        if wrong := sorted(_OURS.keys() & self.trainer.keys()):
            raise ConfigError(f"trainer.{wrong[0]} is set by the recipe; leave it out.")
        if self.lora is not None and self.freeze_vision:
            raise ConfigError("freeze_vision is for full fine-tuning; with lora, target_modules says what is trained.")
        if not all(0 <= rate < 1 for rate in self.eval_rates):
            raise ConfigError(f"eval_rates got {list(self.eval_rates)}; each must be from 0 up to but not including 1.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Reads a recipe.

        Raises:
            ConfigError: See the class; also if the file is no YAML mapping.
            OSError: The file cannot be read.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: Any) -> "Recipe":
        """A recipe from nested mappings, as the YAML file has them."""
        values = _known(cls, content, "the recipe")
        data = _known(DataSettings, values.get("data"), "data")
        if data.get("synthetic") is not None:
            data["synthetic"] = SceneSettings(**_known(SceneSettings, data["synthetic"], "data.synthetic"))
        values["data"] = DataSettings(**data)
        values["rates"] = RateSettings(**_known(RateSettings, values.get("rates") or {}, "rates"))
        if values.get("lora") is not None:
            values["lora"] = LoraSettings(**_known(LoraSettings, values["lora"], "lora"))
        for name in ("model", "trainer"):
            if not values.get(name):
                raise ConfigError(f"'{name}' is missing in the recipe.")
        return cls(**values)


def _known(kind: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {content!r}.")
    names = [f.name for f in dataclasses.fields(kind)]
    if unknown := [str(name) for name in content if name not in names]:
        raise ConfigError(f"Unknown key(s) {', '.join(unknown)} in {where}; known: {', '.join(names)}.")
    return dict(content)


def load_model(recipe: Recipe) -> Any:
    """The model with EVS enabled, ready to train.

    Raises:
        UnsupportedError: The checkpoint is of another architecture.
    """
    import torch
    import transformers

    from evs_vllm import hf
    from evs_vllm.hf.classes import CLASSES, SUPPORTED

    architecture = (transformers.AutoConfig.from_pretrained(recipe.model).architectures or ["(none)"])[0]
    if architecture not in CLASSES:
        raise UnsupportedError(f"uptrain supports {SUPPORTED}, not {architecture}.")
    dtype = getattr(torch, recipe.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype got {recipe.dtype!r}; a name of torch such as float32 or bfloat16 is needed.")
    model = getattr(transformers, architecture).from_pretrained(recipe.model, dtype=dtype)
    processor = transformers.AutoProcessor.from_pretrained(recipe.model)
    hf.enable(model, 0, processor=processor, served_positions=True, **recipe.evs)
    if recipe.freeze_vision:
        model.model.visual.requires_grad_(False)
    if recipe.lora is None:
        return model
    import peft

    lora = recipe.lora
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        **lora.more,
    )
    return peft.get_peft_model(model, config)


def datasets(recipe: Recipe) -> tuple[Any, Any]:
    """The training data and the evaluation data (or None)."""
    from evs_vllm.train.data import ChatDataset, DrawnDataset, FrameSettings

    data = recipe.data
    if data.synthetic is not None:
        evaluation = DrawnDataset(data.synthetic, data.eval_clips, data.seed + 1) if data.eval_clips else None
        return DrawnDataset(data.synthetic, data.train_clips, data.seed), evaluation
    frames = FrameSettings(data.fps, data.max_frames)
    assert data.train is not None  # checked when the recipe was read
    return ChatDataset(data.train, frames), ChatDataset(data.eval, frames) if data.eval else None


def run(recipe: Recipe, resume: bool | str = False, prepare: Callable[[Any], Any] | None = None) -> Any:
    """Trains, and writes the final checkpoint with its processor to ``trainer.output_dir``.

    Args:
        recipe: What to do.
        resume: A checkpoint folder, or True for the last one of ``output_dir``.
        prepare: What to do with the loaded model before training: (model) -> model.

    Returns:
        The trainer, after training.

    Raises:
        EVSError: A package is missing, or the recipe or a checkpoint does not fit.
    """
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise EVSError(f"uptraining needs {error.name}: pip install 'evs-vllm[train]'") from error
    import transformers

    from evs_vllm.train.data import ChatCollator
    from evs_vllm.train.trainer import UptrainTrainer

    try:
        arguments = transformers.TrainingArguments(**{"report_to": ["tensorboard"], **recipe.trainer, **_OURS})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error
    # Before weights: the same seed gives the same LoRA initialisation, as Trainer sets it only when it is made.
    transformers.set_seed(arguments.seed)
    train, evaluation = datasets(recipe)
    model = load_model(recipe)
    if prepare is not None:
        model = prepare(model)
    processor = transformers.AutoProcessor.from_pretrained(recipe.model)
    trainer = UptrainTrainer(
        model=model,
        args=arguments,
        rates=recipe.rates,
        eval_rates=recipe.eval_rates,
        data_collator=ChatCollator(processor, recipe.data.max_length),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    trainer.save_state()
    return trainer
