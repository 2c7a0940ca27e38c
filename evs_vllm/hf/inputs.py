# SPDX-License-Identifier: Apache-2.0
"""The arguments of a call for its pruned prompts: plans, token ids, position IDs, and the features that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Source
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.rows import keep_rows
from evs_vllm.core.scorers import named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import RequestError, UnsupportedError
from evs_vllm.families.base import PixelStats, to_uint8
from evs_vllm.families.front_end import CELLS, sources_of_cells
from evs_vllm.families.qwen2_vl import GRID, PIXELS
from evs_vllm.hf.classes import CLASSES
from evs_vllm.hf.prompt import Batch, MediaItem, prune_batch
from evs_vllm.hf.state import State, state_of

_IGNORED_LABEL = -100


def prune_arguments(
    model: Any,
    config: EVSConfig,
    given: Mapping[str, Any],
    plans: Sequence[RetentionPlan] | None = None,
    cells: torch.Tensor | None = None,
) -> tuple[dict[str, Any], Batch]:
    """The arguments of the stock method for the pruned prompts, with computed image and video features.

    Args:
        model: With EVS enabled.
        config: The settings of the call.
        given: The arguments of the call.
        plans: Ready plans of its clips, in order, without a layout; None to make them.
        cells: The low-resolution pictures of its clips, as a watched processor hands them on (`CELLS`).

    Raises:
        EVSError: The arguments cannot be pruned.
    """
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
    if config.stream and config.active and plans is None and len(ids) > 1:
        raise UnsupportedError(
            f"A stream is one conversation, and this batch has {len(ids)}. Call the model once for each, or leave "
            "stream out."
        )
    state = state_of(model)
    pixels, seconds = out.pop(PIXELS), out.pop("second_per_grid_ts", None)
    image_pixels, grids, image_grids = (out.pop(name, None) for name in ("pixel_values", GRID, "image_grid_thw"))
    clips = _plan_clips(model, config, pixels, grids, seconds, plans, cells)
    images = [] if image_grids is None else [MediaItem(_in_tokens(model, grid)) for grid in image_grids.tolist()]
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
        return tuple(keep_rows(embeds, plans))

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
            embeds.append(state_of(model).encode(visual, clip, plan))
        else:
            embeds += model.model.get_video_features(clip, grid[None], return_dict=True).pooler_output
    return BaseModelOutputWithPooling(pooler_output=stay(embeds))


def _in_tokens(model: Any, grid: Any) -> tuple[int, int, int]:
    units, height, width = (int(x) for x in grid)
    merge = model.config.vision_config.spatial_merge_size
    return units, height // merge, width // merge


def _plan_clips(
    model: Any,
    config: EVSConfig,
    pixels: torch.Tensor,
    grids: Any,
    seconds: Any,
    plans: Sequence[RetentionPlan] | None,
    cells: torch.Tensor | None,
) -> list[tuple[MediaItem, RetentionPlan]]:
    state = state_of(model)
    vision = model.config.vision_config
    if grids is None or int(grids.prod(-1).sum()) != len(pixels):
        raise RequestError(f"{PIXELS} has {len(pixels)} rows, which do not fit {GRID}={grids}.")
    if plans is not None and [plan.grid for plan in plans] != [_in_tokens(model, grid) for grid in grids]:
        raise RequestError(
            f"evs_plans has grids {[plan.grid for plan in plans]}, but the clips have "
            f"{[_in_tokens(model, grid) for grid in grids]}. Give one plan per clip, in order."
        )
    if plans is not None and not CLASSES[type(model).__name__].reuse and any(p.encoder == "reuse" for p in plans):
        raise UnsupportedError(f"encoder 'reuse' does not run in transformers' {type(model).__name__}; use 'full'.")
    judged = config.active and plans is None
    if judged:
        _check_normalised(pixels, vision.in_channels, state.adapter.stats)
        sources = _sources(state, config, [_in_tokens(model, grid) for grid in grids], cells)
        selection = named_selection(config.selection) if state.selection is None else state.selection
    units_apart = CLASSES[type(model).__name__].units_apart
    clips, anchors = [], None
    rows = pixels.detach().split(grids.prod(-1).tolist())
    for number, (clip_pixels, grid) in enumerate(zip(rows, grids, strict=True)):
        fields = {PIXELS: clip_pixels, GRID: grid}
        if seconds is not None:
            # As served: vLLM makes an fp32 tensor of it and casts that to the model's dtype, and the product with the
            # IDs per second is cut to integers. In bf16, 1.5 frames a second are other IDs from about 64 units on.
            fields["second_per_grid_ts"] = torch.tensor(float(seconds[number])).to(model.dtype)
        step = 1.0 if units_apart else state.adapter.ids_per_unit(fields)  # type: ignore[attr-defined]
        shape = _in_tokens(model, grid)
        medium = MediaItem(shape, step, units_apart, state.adapter.position_span(fields, shape))
        if plans is not None:
            plan = plans[number]
        elif judged:
            clip = state.adapter.clip(fields)
            assert clip is not None  # it has pixels
            if sources is not None:
                clip = replace(clip, source=sources[number])
            clip = clip.after(anchors)
            plan = make_plan(clip, config, selection)
            if config.stream:
                anchors = selection.anchors(torch.from_numpy(plan.kept), clip, config)
        else:
            plan = RetentionPlan(medium.grid, np.arange(medium.num_tokens))
        clips.append((medium, plan))
    return clips


def _sources(
    state: State, config: EVSConfig, grids: Sequence[tuple[int, int, int]], cells: torch.Tensor | None
) -> list[Source] | None:
    """What each clip is judged by, or None where its pixels alone are looked at."""
    if cells is not None:
        return sources_of_cells(cells, grids)
    selection = named_selection(config.selection) if state.selection is None else state.selection
    if selection.reads_pixels and not (config.encoder == "reuse" and config.encoder_refresh):
        return None
    raise RequestError(
        f"Clips are judged by their frames as they were before the processor resized them, which {PIXELS} does not "
        f"hold. Call enable(model, processor=processor) before the processor makes the inputs: it then adds {CELLS} to "
        "them (of frames that are uint8 of three colours), which goes to the model with the rest. Or use "
        "selection='paper' (with a tower that reuses, encoder_refresh=0)."
    )


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
