# SPDX-License-Identifier: Apache-2.0
"""The small models of the quality lab and of the demo (`demo_model.py`): settings and training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
import transformers
import yaml
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import BatchFeature, Qwen2VLVideoProcessor

import evs_vllm.hf.tower
from evs_vllm.config import EVSConfig
from evs_vllm.core import scorers
from evs_vllm.errors import ConfigError
from evs_vllm.testing import make_model
from evs_vllm.train import recipe
from evs_vllm.train.synthetic import SceneSettings

SELECTIONS = (
    "evs", "focus", "cosine", "random", "random_unit0", "frames",
    *(name for name in scorers.SELECTIONS if name != EVSConfig().selection),
)  # fmt: skip
"""What users get ("evs"), also with a focus on the time that is asked for, comparisons (`bench.quality.ask`), and the
other selections of the package by name."""
POSITIONS = ("keep", "sequential")
TOWERS = ("full", "reuse", "skip")
WAYS = [
    [selection, positions, tower]
    for selection in SELECTIONS
    for tower in TOWERS
    for positions in POSITIONS
    # A tower that leaves patches out computes unit 0 whole, which "random" does not keep.
    if selection != "random" or tower == "full"
]
"""Every [selection, positions, tower] that there is; the first is what users get."""
_OF_THE_RUN = ("seeds", "clips", "ask_rates", "compare", "control", "engine", "engine_clips")
"""Settings that leave each checkpoint as it is."""
DENSE = {"distribution": "list", "values": [0]}


@dataclass
class Settings:
    """A file of configs/quality. Every key has a default.

    Attributes:
        scene: What clips look like (`SceneSettings`); the last length of the curriculum is the one that is asked about.
        sizes: Sizes of the model (`evs_vllm.testing.SIZES`).
        training_scene: What is different in the clips of training; a task that is named twice is asked twice as often.
        curriculum: [units, steps] of each stage of the base, with what else is different in its clips if anything.
        further: [steps] of each stage of the control and of the uptrained model, which go on from the base, with what
            else is different in its clips if anything.
        further_learning_rate: Learning rate of these steps; a third of `learning_rate` by default.
        control: Whether to train the control.
        batch: Clips of a mini-batch.
        learning_rate: Learning rate of the base.
        rates: What uptraining draws from (`RateSettings`).
        seeds: One base, control and uptrained model each.
        clips: How many unseen clips are asked about, as many of each condition.
        ask_rates: At which rates, besides 0.
        compare: Lines of the table besides the first, out of `WAYS`; one that also names rates has those only.
        engine: Models of the first seed that are asked through vLLM, too.
        engine_clips: About how many of the clips.
    """

    scene: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "layers": 4,
            "vision_hidden": 64,
            "vision_layers": 2,
            "rope_theta": 1e6,
        }
    )
    training_scene: dict[str, Any] = field(default_factory=dict)
    curriculum: list[list[Any]] = field(default_factory=lambda: [[8, 400], [16, 200], [32, 500]])
    further: list[list[Any]] = field(default_factory=lambda: [[300]])
    further_learning_rate: float | None = None
    control: bool = True
    batch: int = 32
    learning_rate: float = 1e-3
    rates: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    clips: int = 480
    ask_rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 0.95])
    compare: list[list[Any]] = field(default_factory=lambda: WAYS[1:])
    engine: list[str] = field(default_factory=list)
    engine_clips: int = 400

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        content = yaml.safe_load(Path(path).read_text()) or {}
        if unknown := set(content) - set(cls.__dataclass_fields__):
            raise ConfigError(f"{path}: unknown key(s) {sorted(unknown)}; known: {', '.join(cls.__dataclass_fields__)}")
        settings = cls(**content)
        for line in settings.compare:
            rates = line[3] if len(line) == 4 else []
            if line[:3] not in WAYS[1:] or len(line) > 4 or not set(rates) <= set(settings.ask_rates):
                raise ConfigError(
                    f"{path}: compare got {line}; a line is [selection, positions, tower] out of "
                    f"{', '.join(SELECTIONS)}; {', '.join(POSITIONS)}; {', '.join(TOWERS)}; random has tower full "
                    "only. A list of some of ask_rates may follow."
                )
        if settings.clips % len(settings.scenes.conditions):
            raise ConfigError(f"{path}: clips got {settings.clips}; each condition needs as many.")
        if not set(settings.engine) <= set(settings.models):
            raise ConfigError(f"{path}: engine got {settings.engine}; known: {', '.join(settings.models)}.")
        return settings

    @property
    def models(self) -> tuple[str, ...]:
        """What is trained of each seed."""
        return ("base", *(["control"] if self.control else []), "uptrained")

    def ways(self, name: str) -> list[tuple[list[str], list[float]]]:
        """How the model `name` is asked: [selection, positions, tower] and the rates, besides 0."""
        lines = [line if len(line) == 4 else [*line, self.ask_rates] for line in self.compare if name != "control"]
        return [(line[:3], line[3]) for line in ([*WAYS[0], self.ask_rates], *lines)]

    @property
    def scenes(self) -> SceneSettings:
        """The settings of the clips that are asked about."""
        return SceneSettings(**self.scene | {"units": self.curriculum[-1][0]})

    def training(self, *different: dict[str, Any]) -> SceneSettings:
        """The settings of the clips of training."""
        scene = self.scenes
        for more in (self.training_scene, *different):
            scene = replace(scene, **more)
        return scene


def untrained(folder: Path, settings: Settings, seed: int) -> Path:
    """A model with ordinary random weights (those of `make_model` are made for sharp comparisons, not for learning)."""
    make_model(folder, "qwen2_5_vl", seed=seed, **settings.sizes)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    # Attention within whole units in every layer: cells are too few for windows, and equal chunks train faster.
    model.config.vision_config.fullatt_block_indexes = list(range(model.config.vision_config.depth))
    # One ID per unit: heads are so small that only four frequencies turn with time, and the slowest must not turn half
    # around within a clip. Otherwise no head can look for the latest of something, and a model learns to look at the
    # last unit instead, which is gone once the clip is pruned.
    model.config.vision_config.tokens_per_second = 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.08, generator=generator)  # 0.02 does not start to learn in this depth
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
    model.save_pretrained(folder)
    return folder


def speed_up(model: Any) -> Any:
    """Lets the tower run its Conv3d as a matmul and units of equal size as a batch: most of the training time."""
    visual = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.visual

    def embed(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows.to(self.proj.weight.dtype).view(len(rows), -1), self.proj.weight.view(self.embed_dim, -1))

    def attend(self: Any, hidden_states: torch.Tensor, cu_seqlens: Any, position_embeddings: Any, **_: Any) -> Any:
        rows, units = len(hidden_states), len(cu_seqlens) - 1
        query, key, value = self.qkv(hidden_states).view(rows, 3, self.num_heads, -1).unbind(1)
        cos, sin = (x[:, None] for x in position_embeddings)
        query, key = (evs_vllm.hf.tower.rotate(x, cos, sin) for x in (query, key))
        query, key, value = (x.reshape(units, rows // units, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, -1))

    visual.patch_embed.forward = MethodType(embed, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    return model


def _clip_by_clip(stock: Callable[..., BatchFeature]) -> Callable[..., BatchFeature]:
    """The video processor's work on one clip after the other: it stacks clips of equal size, which leaves the cache."""

    def preprocess(self: Any, videos: Sequence[torch.Tensor], **kwargs: Any) -> BatchFeature:
        parts = [stock(self, [clip], **kwargs) for clip in videos]
        return BatchFeature({key: torch.cat([part[key] for part in parts]) for key in parts[0]})

    return preprocess


def train(
    start: Path,
    out: Path,
    settings: Settings,
    scene: SceneSettings,
    steps: int,
    rates: dict[str, Any],
    seed: int,
    learning_rate: float,
) -> Path:
    """Trains from the checkpoint `start` and writes one to `out`, by the package's own recipe.

    Where `out` holds one of an earlier run (see `claim`), that is taken.
    """
    if (out / "trainer_state.json").is_file():
        return out
    described = recipe.Recipe.from_mapping(
        {
            "model": str(start),
            "data": {
                "synthetic": asdict(scene),
                "train_clips": steps * settings.batch,
                "eval_clips": 0,
                "seed": 1000 + seed,
            },
            "rates": {"seed": seed, **rates},
            "trainer": {
                "output_dir": str(out),
                "max_steps": steps,
                "per_device_train_batch_size": settings.batch,
                "learning_rate": learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": min(30, steps // 10),
                "adam_beta2": 0.98,
                "weight_decay": 0.01,
                "logging_steps": 50,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
                "seed": seed,
            },
        }
    )
    # Of transformers' own: no argument reaches it.
    with patch.object(Qwen2VLVideoProcessor, "_preprocess", _clip_by_clip(Qwen2VLVideoProcessor._preprocess)):
        recipe.run(described, prepare=speed_up)
    return out


def train_base(folder: Path, settings: Settings, seed: int) -> Path:
    """The base of a seed: from random weights at rate 0, on clips of growing length."""
    here = folder / str(seed) / "random"
    if not (here / "config.json").is_file():
        untrained(here, settings, seed)
    for stage, (units, steps, *more) in enumerate(settings.curriculum):
        scene = settings.training({"units": units}, *more)
        out = folder / str(seed) / f"base-{stage}"
        here = train(here, out, settings, scene, steps, DENSE, 100 * seed + stage, settings.learning_rate)
    return here


def train_further(folder: Path, settings: Settings, seed: int, name: str) -> Path:
    """The "control" (rate 0) or the "uptrained" model (random rates) of a seed: the same clips, from the same base."""
    rates = {"control": DENSE, "uptrained": settings.rates}[name]
    learning_rate = settings.further_learning_rate or settings.learning_rate / 3
    here = train_base(folder, settings, seed)
    for stage, (steps, *more) in enumerate(settings.further):
        out = folder / str(seed) / f"{name}-{stage}"
        here = train(
            here, out, settings, settings.training(*more), steps, rates, 100 * seed + 50 + stage, learning_rate
        )
    return here


def claim(folder: Path, settings: Settings) -> None:
    """Makes `folder` one of these settings, so that a run that was interrupted or gets further seeds goes on there.

    Raises:
        ConfigError: It holds checkpoints of other settings.
    """
    described = json.dumps({k: v for k, v in asdict(settings).items() if k not in _OF_THE_RUN}, indent=1)
    path = folder / "settings.json"
    if path.is_file() and path.read_text() != described:
        raise ConfigError(f"{folder} holds checkpoints of other settings; give another --work or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(described)
