# SPDX-License-Identifier: Apache-2.0
"""Puts EVS into a transformers model: its instance gets a ``forward`` and a ``generate`` that prune first.

The class stays what it is, so that ``save_pretrained`` writes the right ``architectures`` and PEFT, Trainer and
``torch.compile`` find what they know. The methods are bound to the instance (not closures over it), so a deep copy
prunes too and is independent of the original.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from types import MethodType
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_vllm.config import EVSConfig, split_request_kwargs
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.rows import keep_rows
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import ConfigError, RequestError, UnsupportedError
from evs_vllm.families import family_of
from evs_vllm.families.base import FamilyAdapter, PixelStats, to_uint8
from evs_vllm.families.qwen2_vl import GRID, PIXELS
from evs_vllm.hf.classes import CLASSES, SUPPORTED
from evs_vllm.hf.prompt import Batch, Medium, prune_batch
from evs_vllm.hf.tower import encode

_STATE = "_evs"
_IGNORED_LABEL = -100


@dataclass
class _State:
    config: EVSConfig
    stats: PixelStats
    adapter: FamilyAdapter
    served_positions: bool
    plans: list[RetentionPlan] = field(default_factory=list)
    batch: Batch | None = None


def enable(
    model: Any, rate: float | None = None, *, processor: Any = None, served_positions: bool = False, **options: Any
) -> Any:
    """Lets a transformers model prune the clips that ``forward`` and ``generate`` get.

    A call may override the settings with the request keys of the server: ``model.generate(..., evs_rate=0.9)``.
    ``generate`` returns the unpruned prompt followed by the new tokens, as without EVS; ``forward`` returns logits of
    the tokens that stay (`last_plans` says which), and with labels the loss over them. Stopping criteria and logits
    processors see the pruned prompt.

    Args:
        model: Of one of the classes in `CLASSES`, or a PEFT model of one.
        rate: Fraction of each clip's tokens to drop, 0 <= rate < 1.
        processor: The model's processor, if it does not normalise pixels as the released ones do.
        served_positions: Also give prompts from which nothing is dropped (rate 0) the position IDs that vLLM gives.
            transformers resumes text after a long clip at other IDs; without this, rate 0 is the stock model bit for
            bit. For training.
        **options: Further fields of `EVSConfig`: threshold, positions, min_tokens_per_unit, max_tokens, encoder,
            encoder_refresh. The encoder is "full" by default; "reuse" has no backward pass.

    Returns:
        `model`.

    Raises:
        ConfigError: A value is not allowed.
        UnsupportedError: The model is of another class, or its processor does not normalise.
    """
    base = _base(model)
    name = type(base).__name__
    family = family_of(name)
    if name not in CLASSES or family is None:
        raise UnsupportedError(f"EVS for transformers supports {SUPPORTED}, not {name}.")
    unknown = sorted({"request_overrides", "rate"} & set(options))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} cannot be given here.")
    config = EVSConfig.from_mapping({"rate": rate, **options, "request_overrides": "any"})
    stats = CLASSES[name].stats
    if processor is not None:
        look = getattr(processor, "video_processor", None) or processor
        if not (look.do_rescale and look.do_normalize):
            raise UnsupportedError("The processor must rescale and normalise pixels (do_rescale, do_normalize).")
        stats = PixelStats(tuple(look.image_mean), tuple(look.image_std))
    state = _State(_exact_unless_asked(config), stats, family.load_adapter(), served_positions)
    setattr(base, _STATE, state)
    for method_name, method in _methods(base).items():
        setattr(base, method_name, MethodType(method, base))
    return model


def disable(model: Any) -> Any:
    """Undoes `enable`; a model without EVS stays as it is.

    Returns:
        `model`.

    Raises:
        UnsupportedError: Something else has wrapped the model's ``forward`` since (for example accelerate).
    """
    base = _base(model)
    if getattr(base, _STATE, None) is None:
        return model
    for name, ours in _methods(base).items():
        if getattr(getattr(base, name), "__func__", None) is not ours:
            raise UnsupportedError(f"{name} was wrapped by something else after enable(); unwrap that first.")
    for name in (*_methods(base), _STATE):
        delattr(base, name)
    return model


def last_plans(model: Any) -> list[RetentionPlan]:
    """What the last call with clips kept, one plan per clip in the order of the batch."""
    return list(_state(model).plans)


def last_batch(model: Any) -> Batch:
    """How the last call with clips shortened its batch: ``last_batch(model).take(labels, -100)`` fits its logits."""
    batch = _state(model).batch
    if batch is None:
        raise UnsupportedError("The model was not called with clips since enable(), or nothing was asked of EVS.")
    return batch


def _state(model: Any) -> _State:
    state = getattr(_base(model), _STATE, None)
    if state is None:
        raise UnsupportedError("EVS is not enabled on this model; call enable() first.")
    return state  # type: ignore[no-any-return]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _exact_unless_asked(config: EVSConfig) -> EVSConfig:
    return replace(config, encoder="full") if config.encoder == "auto" else config


def _methods(model: Any) -> dict[str, Callable[..., Any]]:
    cls: Any = type(model)
    return {"forward": _pruning_forward(cls), "generate": _pruning_generate(cls)}


@cache
def _pruning_forward(cls: Any) -> Callable[..., Any]:
    stock = cls.forward
    signature = inspect.signature(stock)

    @wraps(stock)  # generate() and Trainer look at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, kwargs = _settings(self, kwargs)
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        given |= bound.get("kwargs", {})
        if given.get(PIXELS) is None:
            _check_cache(given)
        elif config.active or getattr(self, _STATE).served_positions:
            given, _ = _prune(self, config, given)
        return stock(self, **given)

    return forward


@cache
def _pruning_generate(cls: Any) -> Callable[..., Any]:
    stock = cls.generate

    @torch.no_grad()
    @wraps(stock)
    def generate(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        config, kwargs = _settings(self, kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get(PIXELS) is None or not (config.active or getattr(self, _STATE).served_positions):
            return stock(self, *args, **kwargs)
        if kwargs.get("assistant_model") is not None:
            raise UnsupportedError("EVS and assisted generation do not go together; leave assistant_model out.")
        prompt = kwargs.get("input_ids")
        pruned, batch = _prune(self, config, kwargs)
        if not (batch.mask[:, -1] == 1).all():
            raise RequestError("generate() needs prompts that are padded on the left (padding_side='left').")
        media = (self.config.image_token_id, self.config.video_token_id)
        if any((prompt[:, -1] == token).any() for token in media):  # type: ignore[index]
            # generate() counts on from the last ID, which is not where text after a clip resumes.
            raise RequestError("A prompt ends in an image or a clip; generate() needs some text after it.")
        text = (batch.mask.cumsum(-1) - 1).clamp(min=0)[None].to(pruned["position_ids"].device)
        pruned["position_ids"] = torch.cat([text, pruned["position_ids"]])
        shorter = prompt.shape[1] - pruned["input_ids"].shape[1]  # type: ignore[union-attr]
        _shorten_limits(self, args, pruned, shorter)
        out = stock(self, *args, **pruned)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        repeats = sequences.shape[0] // prompt.shape[0]  # type: ignore[union-attr]
        new = sequences[:, pruned["input_ids"].shape[1] :]
        whole = torch.cat([prompt.repeat_interleave(repeats, 0).to(new.device), new], dim=1)  # type: ignore[union-attr]
        if isinstance(out, torch.Tensor):
            return whole
        out.sequences = whole
        return out

    return generate


def _settings(model: Any, kwargs: Mapping[str, Any]) -> tuple[EVSConfig, dict[str, Any]]:
    overrides, rest = split_request_kwargs(kwargs)
    config = _exact_unless_asked(getattr(model, _STATE).config.for_request(overrides))
    if config.encoder == "reuse" and not CLASSES[type(model).__name__].reuse:
        raise UnsupportedError(f"encoder 'reuse' does not run in transformers' {type(model).__name__}; use 'full'.")
    return config, rest


def _shorten_limits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shorter: int) -> None:
    """``max_length`` and ``min_length`` count the prompt that the caller knows, the stock method the pruned one."""
    config = args[0] if args else kwargs.get("generation_config") or model.generation_config
    for name in ("max_length", "min_length"):
        limit = kwargs.get(name, getattr(config, name, None))
        counted = kwargs.get(
            name.replace("length", "new_tokens"), getattr(config, name.replace("length", "new_tokens"))
        )
        if limit and counted is None:
            kwargs[name] = max(limit - shorter, 0)


def _check_cache(given: Mapping[str, Any]) -> None:
    """A decoding step after a pruned prompt: its mask has to be that of the pruned prompt."""
    cache, mask, ids = (given.get(name) for name in ("past_key_values", "attention_mask", "input_ids"))
    if cache is None or ids is None or not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return
    seen = cache.get_seq_length()
    if seen and mask.shape[1] != seen + ids.shape[1]:
        raise RequestError(
            f"attention_mask covers {mask.shape[1]} tokens, but the cache holds {seen} (the pruned prompt) and "
            f"{ids.shape[1]} follow. Use generate(), or a mask of that length."
        )


def _prune(model: Any, config: EVSConfig, given: Mapping[str, Any]) -> tuple[dict[str, Any], Batch]:
    """The arguments of the stock method for the pruned prompts, with computed image and video features."""
    out = dict(given)
    for name, why in (
        ("inputs_embeds", "the placeholders are found in input_ids"),
        ("position_ids", "they are computed from the unpruned prompt"),
        ("mm_encoder_outputs", "clips are compared by their pixels"),
    ):
        if out.get(name) is not None:
            raise UnsupportedError(f"EVS cannot take {name}: {why}. Pass what the processor returned.")
    cache = out.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            "EVS cannot add clips to a cache that already holds tokens; pass the whole conversation."
        )
    ids, mask = out.get("input_ids"), out.get("attention_mask")
    if ids is None or ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise UnsupportedError("EVS needs input_ids of (batch, length) and attention_mask of the same shape or None.")
    state: _State = getattr(model, _STATE)
    pixels, seconds = out.pop(PIXELS), out.pop("second_per_grid_ts", None)
    image_pixels, grids, image_grids = (out.pop(name, None) for name in ("pixel_values", GRID, "image_grid_thw"))
    clips = _plan_clips(model, config, pixels, grids, seconds)
    images = [] if image_grids is None else [Medium(_in_tokens(model, grid)) for grid in image_grids.tolist()]
    placeholders = {"image": model.config.image_token_id, "video": model.config.video_token_id}
    state.batch = batch = prune_batch(ids, mask, placeholders, images, clips)

    text = model.config.get_text_config()
    padding = text.pad_token_id if isinstance(text.pad_token_id, int) else 0
    out["input_ids"] = batch.take(ids, padding)
    out["attention_mask"] = None if mask is None and not batch.padded else batch.mask.to(ids.device)
    if out.get("labels") is not None:
        out["labels"] = batch.take(out["labels"], _IGNORED_LABEL)
    if out.get("mm_token_type_ids") is not None:
        out["mm_token_type_ids"] = batch.take(out["mm_token_type_ids"], 0)
    out["position_ids"] = batch.positions.to(ids.device)
    model.model.rope_deltas = batch.deltas.to(ids.device)

    state.plans = list(batch.plans)
    out["mm_encoder_outputs"] = {"video": _video_features(model, pixels, grids, state.plans)}
    if image_pixels is not None:
        # The stock method refuses to compute one modality when the other is given.
        image_features = model.model.get_image_features(image_pixels, image_grids, return_dict=True)
        out["mm_encoder_outputs"]["image"] = image_features
    return out, batch


def _video_features(model: Any, pixels: torch.Tensor, grids: Any, plans: Sequence[RetentionPlan]) -> Any:
    """The kept embedding rows of each clip, as ``get_video_features`` returns them."""

    def stay(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(keep_rows(rows, plan) for rows, plan in zip(embeds, plans, strict=True))

    visual = model.model.visual
    if all(plan.encoder == "full" for plan in plans):
        features = model.model.get_video_features(pixels, grids, return_dict=True)
        features.pooler_output = stay(features.pooler_output)
        if getattr(features, "deepstack_features", None) is not None:
            features.deepstack_features = [stay(level) for level in features.deepstack_features]
        return features
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in visual.parameters()):
        raise UnsupportedError(
            "encoder 'reuse' has no backward pass. Use torch.no_grad(), freeze the vision tower, or train with "
            "encoder 'full'."
        )
    embeds = []
    for clip, grid, plan in zip(pixels.split(grids.prod(-1).tolist()), grids, plans, strict=True):
        if plan.encoder == "reuse":
            embeds.append(encode(visual, clip, plan))
        else:
            embeds += model.model.get_video_features(clip, grid[None], return_dict=True).pooler_output
    return BaseModelOutputWithPooling(pooler_output=stay(embeds))


def _in_tokens(model: Any, grid: Any) -> tuple[int, int, int]:
    units, height, width = (int(x) for x in grid)
    merge = model.config.vision_config.spatial_merge_size
    return units, height // merge, width // merge


def _plan_clips(
    model: Any, config: EVSConfig, pixels: torch.Tensor, grids: Any, seconds: Any
) -> list[tuple[Medium, RetentionPlan]]:
    state: _State = getattr(model, _STATE)
    vision = model.config.vision_config
    if grids is None or int(grids.prod(-1).sum()) != len(pixels):
        raise RequestError(f"{PIXELS} has {len(pixels)} rows, which do not fit {GRID}={grids}.")
    if config.active:
        _check_normalised(pixels, vision.in_channels, state.stats)
    per_second = getattr(vision, "tokens_per_second", None)
    units_apart = CLASSES[type(model).__name__].units_apart
    clips = []
    rows = pixels.detach().split(grids.prod(-1).tolist())
    for number, (clip_pixels, grid) in enumerate(zip(rows, grids, strict=True)):
        # In fp32 and then in Python's floats, as vLLM does: the product is cut to integers.
        step = 1.0
        if per_second is not None:
            step = (1.0 if seconds is None else float(np.float32(seconds[number]))) * per_second
        medium = Medium(_in_tokens(model, grid), step, units_apart)
        if config.active:
            clip = state.adapter.clip({PIXELS: clip_pixels, GRID: grid}, model.config, state.stats)
            assert clip is not None  # it has pixels
            plan = make_plan(clip.tokens.contiguous(), clip.grid, config)
        else:
            plan = RetentionPlan(medium.grid, np.arange(medium.num_tokens))
        clips.append((medium, plan))
    return clips


def _check_normalised(pixels: torch.Tensor, channels: int, stats: PixelStats) -> None:
    """Scores are differences of uint8 pixels: another mean or deviation would select other tokens without a word."""
    if pixels.dtype != torch.float32:
        return
    some = pixels.detach()[:: max(1, len(pixels) // 16)]
    levels = to_uint8(some, channels, stats)
    mean = torch.tensor(stats.mean, device=some.device).view(1, channels, 1)
    std = torch.tensor(stats.std, device=some.device).view(1, channels, 1)
    exact = (some.view(len(some), channels, -1) * std + mean).view(some.shape) * 255
    if (exact - levels).abs().max() > 0.05:
        raise RequestError(
            "The pixels are not uint8 values normalised with "
            f"mean {stats.mean} and deviation {stats.std}. Pass the processor that made them: enable(..., processor=)."
        )
