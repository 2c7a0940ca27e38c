# SPDX-License-Identifier: Apache-2.0
"""The processor side, for any family: plan each clip, shorten its placeholders, tell its cache keys apart."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing.processor import BaseMultiModalProcessor, PromptUpdateDetails

from evs_vllm.config import EVSConfig, refuse_keys, split_request_kwargs
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import BoolArray, RetentionPlan
from evs_vllm.core.positions import room_to_answer
from evs_vllm.core.prompt import pruned_clip
from evs_vllm.core.selection import make_plan
from evs_vllm.engine.compat import settings_of
from evs_vllm.engine.metrics import metrics
from evs_vllm.errors import RequestError, UnsupportedError
from evs_vllm.families import Family, family_of
from evs_vllm.families.base import FamilyAdapter

logger = init_logger("vllm.evs_vllm")

PLAN_FIELD = "evs_plan"
"""Name of the plan among a clip's multimodal fields."""

MODALITY = "video"

_OFF = EVSConfig()
# The settings of the request that this thread is processing. vLLM calls `apply` and all it calls synchronously.
_settings: ContextVar[EVSConfig] = ContextVar("evs_settings", default=_OFF)
_profiling: ContextVar[bool] = ContextVar("evs_profiling", default=False)

T = TypeVar("T")


@contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass
class PrunedUpdateDetails(PromptUpdateDetails):
    """A clip's shortened placeholders; it stays in the processor cache, so cache hits know the numbers too.

    Attributes:
        plan: The clip's plan.
        position_span: Position IDs that the clip takes up.
    """

    plan: RetentionPlan | None = None
    position_span: int = 0


class _FixedMask:
    """An ``is_embed`` callable that gives the same mask whatever it is asked for."""

    def __init__(self, mask: BoolArray) -> None:
        self._mask = torch.from_numpy(mask)

    def __call__(self, full: list[int]) -> torch.Tensor:
        return self._mask


class EVSProcessorMixin(BaseMultiModalProcessor):
    """Goes before a family's processor class; `_evs` is set by `processor_class`."""

    _evs: FamilyAdapter

    @property
    def _evs_config(self) -> EVSConfig:
        config: EVSConfig = settings_of(self.info.ctx.model_config) or _OFF
        return config

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        ours, rest = split_request_kwargs(inputs.hf_processor_mm_kwargs)
        settings = _OFF if _profiling.get() else self._evs_config.for_request(ours)
        if ours:
            inputs = replace(inputs, hf_processor_mm_kwargs=rest)
        if settings.active and MODALITY in inputs.mm_data_items and (why := self._evs.kwargs_obstacle(rest)):
            raise RequestError(
                f"EVS cannot prune this request's video: {why}. Leave that out, or set evs_rate to 0 where the server "
                "admits it."
            )
        with _set(_settings, settings):
            return super().apply(inputs, timing_ctx)

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Memory is profiled as without EVS: what the tower computes does not shrink, and dummy clips are all ties.
        with _set(_profiling, True):
            return super().get_dummy_mm_inputs(*args, **kwargs)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)
        if (settings := _settings.get()).active and MODALITY in hashes:
            digest = hashlib.sha256(settings.identity.encode()).hexdigest()[:16]
            hashes = {**hashes, MODALITY: [f"{item}-evs{digest}" for item in hashes[MODALITY]]}
        return hashes

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        settings = _settings.get()
        if not settings.active or not updates.get(MODALITY):  # empty when the processor cache has every clip
            return updates
        pruned = [
            self._prune(item, item_updates, settings)
            for item, item_updates in zip(out_mm_kwargs[MODALITY], updates[MODALITY], strict=True)
        ]
        return {**updates, MODALITY: pruned}

    def _prune(self, item: Any, updates: Any, settings: EVSConfig) -> Any:
        """Plans one clip, puts the plan among its fields and returns its prompt updates, shortened."""
        started = time.perf_counter()
        fields = {key: elem.data for key, elem in item.items()}
        stats = self._evs.pixel_stats(self.info.get_hf_processor())
        clip = self._evs.clip(fields, self.info.get_hf_config(), stats)
        if clip is None:
            logger.warning_once("EVS: precomputed video embeddings have no pixels to compare; they are not pruned.")
            return updates
        plan = make_plan(clip.tokens, clip.grid, settings)
        span = self._evs.position_span(fields, clip.grid, self.info.get_hf_config())
        pruned = [replace(u, content=self._pruned_details(u.content, clip, plan, span)) for u in updates]
        array = pruned[0].content.plan.to_array()
        if any((update.content.plan.to_array() != array).any() for update in pruned[1:]):
            raise UnsupportedError("A clip has several ways to be laid out in the prompt; EVS needs exactly one.")
        if plan.encoder == "reuse":
            # Pixels that nobody computes need not be hashed, cached, serialised or copied to the device.
            for key, data in self._evs.computed_pixels(fields, plan).items():
                item[key] = replace(item[key], data=data)
        item[PLAN_FIELD] = MultiModalFieldElem(torch.from_numpy(array), MultiModalBatchedField(keep_on_cpu=True))
        metrics().planning_time.observe(time.perf_counter() - started)
        return pruned

    def _pruned_details(
        self, stock: PromptUpdateDetails, clip: Clip, plan: RetentionPlan, span: int
    ) -> PrunedUpdateDetails:
        # Evaluated once, on the unpruned sequence: some families' masks are precomputed and ignore their argument.
        mask = None if stock.is_embed is None else stock.is_embed(stock.full).numpy()
        plan = plan.with_layout(self._evs.layout(stock.full, mask, clip))
        ids, embeds = pruned_clip(plan)
        span = span if plan.positions == "keep" else plan.num_kept
        return PrunedUpdateDetails(ids, None if mask is None else _FixedMask(embeds), plan, span)

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        result = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        updates = mm_res.prompt_updates.get(MODALITY, ())
        contents = [item_updates[0].content for item_updates in updates if item_updates]
        clips = [c for c in contents if isinstance(c, PrunedUpdateDetails) and c.plan is not None]
        if clips:
            self._check_positions(len(result[0]), clips)
            count = metrics()
            count.clips.inc(len(clips))
            count.tokens.inc(sum(clip.plan.num_tokens for clip in clips if clip.plan))
            count.tokens_kept.inc(sum(clip.plan.num_kept for clip in clips if clip.plan))
        return result

    def _check_positions(self, prompt_tokens: int, clips: list[PrunedUpdateDetails]) -> None:
        """Kept positions run as far as the unpruned prompt did, possibly past the end of the model's rotary cache."""
        if not any(clip.plan and clip.plan.positions == "keep" for clip in clips):
            return
        model_config = self.info.ctx.model_config
        extra = sum(clip.position_span - clip.plan.num_kept for clip in clips if clip.plan)
        # Where the scheduler cannot see the plan it cannot end the answer in time, so the whole context has to fit.
        whole_context = model_config.multimodal_config.mm_processor_cache_type == "shm"
        length = max(prompt_tokens, model_config.max_model_len) if whole_context else prompt_tokens
        limit = self._evs.max_position(self.info.get_hf_config(), model_config.max_model_len)
        if room_to_answer(length, extra, limit) < 1:
            way_out = " or serve with a lower --max-model-len" if whole_context else ""
            raise RequestError(
                f"The video(s) of this request take up {sum(clip.position_span for clip in clips)} position IDs before "
                f"pruning, and the prompt with them {length + extra}; the model has {limit}. Send fewer frames or a "
                f"shorter video, set evs_positions to 'sequential'{way_out}."
            )


@cache
def processor_class(stock: type, family: Family) -> type:
    """`stock` with the mixin before it."""
    return type(f"EVS{stock.__name__}", (EVSProcessorMixin, stock), {"_evs": family.load_adapter()})


def _refusing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of a stock processor, refusing the keys that Hugging Face's processor would ignore with a warning."""

    def checked(inputs: Any, timing_ctx: Any) -> Any:
        refuse_keys(inputs.hf_processor_mm_kwargs)
        return apply(inputs, timing_ctx)

    return checked


@dataclass(frozen=True)
class ProcessorFactory:
    """Builds the stock processor when EVS is off and ours when it is on. Put in place of the stock factory."""

    stock: Any
    family: Family

    def __call__(self, info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        if settings_of(info.ctx.model_config) is None:
            processor = self.stock(info, dummy_inputs, **kwargs)
            processor.apply = _refusing(processor.apply)
            return processor
        return processor_class(self.stock, self.family)(info, dummy_inputs, **kwargs)


def end_in_time(model_config: Any, request: Any) -> None:
    """Shortens the answer to a scheduled request whose position IDs would otherwise leave the rotary cache.

    vLLM ends an answer at the context length, counted in tokens; pruned prompts are further along in positions.
    """
    plans = [(feature, plan_of(feature.data)) for feature in request.mm_features or ()]
    family = family_of(model_config.architecture)
    if family is None or all(plan is None or plan.positions != "keep" for _, plan in plans):
        return
    adapter = family.load_adapter()
    hf_config = adapter.media_config(model_config.hf_config)
    extra = 0
    for feature, plan in plans:
        if plan is not None and plan.positions == "keep":
            fields = {key: elem.data for key, elem in feature.data.items()}
            extra += adapter.position_span(fields, plan.grid, hf_config) - plan.num_kept
    limit = adapter.max_position(hf_config, model_config.max_model_len)
    room = room_to_answer(request.num_prompt_tokens, extra, limit)
    request.max_tokens = min(request.max_tokens, max(1, room))


def plan_of(item: Mapping[str, Any] | None) -> RetentionPlan | None:
    """The plan among a clip's fields, if it has one."""
    elem = (item or {}).get(PLAN_FIELD)
    return None if elem is None else RetentionPlan.from_array(elem.data.numpy())
