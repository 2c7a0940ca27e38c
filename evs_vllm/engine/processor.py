# SPDX-License-Identifier: Apache-2.0
"""The processor side, for any family: plan each clip, shorten its placeholders, tell its cache keys apart."""

import hashlib
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldConfig, MultiModalFieldElem
from vllm.multimodal.processing.processor import BaseMultiModalProcessor, PromptUpdateDetails
from vllm.utils.torch_utils import set_default_torch_num_threads

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.engine.attached import settings_of
from evs_vllm.engine.beginnings import name_beginnings
from evs_vllm.engine.current import OFF, Request, current_request, profiling, setting
from evs_vllm.engine.frames_as_images import FRAMES_IN_A_ROW, look_like_frames
from evs_vllm.engine.handover import brings_plans, carry_plans, check_identifiers, given_plan
from evs_vllm.engine.limits import check_positions, take_back
from evs_vllm.engine.metrics import PATHS, metrics, news_of
from evs_vllm.engine.plan_field import MODALITY, PLAN_FIELD
from evs_vllm.engine.pruned import PrunedUpdateDetails, full_mask, placed, shortened
from evs_vllm.engine.streams import Stream, StreamStore, cache_identity, chain, looks_pruned
from evs_vllm.engine.times import Times, seconds_of, unit_starts
from evs_vllm.engine.watching import part_to_watch, rows_of, watch_processors
from evs_vllm.errors import PlanError, RequestError, UnsupportedError
from evs_vllm.families import WHY_NOT_CAUSAL, Family
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.families.front_end import why_not
from evs_vllm.families.seen import Seen
from evs_vllm.families.watched import watching
from evs_vllm.requests import AFTER_KEY, admit, split_request_kwargs

logger = init_logger("vllm.evs_vllm")


class EVSProcessorMixin(BaseMultiModalProcessor):
    """Goes before a family's processor class; `_evs_family` is set by `processor_class`."""

    _evs_family: Family
    _evs_why_stock: str
    """Why no clip's pixel rows are made without Hugging Face's processor, or ""."""

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)
        for parser in (info.data_parser, self.data_parser):
            carry_plans(parser)
        self._evs_store = StreamStore(int(self._evs_config.stream_cache_gb * 2**30))
        self._evs_why_stock = "this family's does more than to resize frames and cut them into patches"
        if self._evs_watches:
            watch_processors(info)
            video_processor = part_to_watch(info.get_hf_processor())
            if video_processor is not None:
                self._evs_why_stock = why_not(video_processor, self._evs.squares)
        why = self._evs_why_stock
        logger.info_once(
            "EVS: pixels of clips for %s are made %s.",
            self._evs_family.name,
            f"by Hugging Face's processor: {why}" if why else "of the tokens that the vision tower computes",
        )

    @cached_property
    def _evs(self) -> FamilyAdapter:
        return self._evs_family.bind(self.info.get_hf_config(), processor=self.info.get_hf_processor())

    @property
    def _evs_watches(self) -> bool:
        return self._evs.judges_source or self._evs.squares is not None

    @property
    def _evs_config(self) -> EVSConfig:
        config: EVSConfig = settings_of(self.info.ctx.model_config) or OFF
        return config

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        ours, rest = split_request_kwargs(inputs.hf_processor_mm_kwargs)
        settings = OFF if profiling.get() else admit(self._evs_config, ours)
        if ours:
            inputs = replace(inputs, hf_processor_mm_kwargs=rest)
        if settings.active and MODALITY in inputs.mm_data_items and (why := self._evs.unsupported_kwargs(rest)):
            raise RequestError(
                f"EVS cannot prune this request's video: {why}. Leave that out, or set evs_rate to 0 where the server "
                "admits it."
            )
        if settings.active and settings.budget == "causal" and not self._evs_family.grows:
            raise RequestError(f"evs_budget 'causal' is not possible here: {WHY_NOT_CAUSAL} Leave it out.")
        if settings.active and look_like_frames(inputs.mm_data_items.get("image")):
            metrics().frames_as_images.inc()
            logger.warning_once(
                "EVS: a request has %d or more images of one size in a row. If they are the frames of a video, they "
                "are not pruned: send them as one (data:video/jpeg;base64,FRAME,FRAME,...; see docs/options.md).",
                FRAMES_IN_A_ROW,
            )
        request = Request(settings, inputs.cache)
        with ExitStack() as within:
            within.enter_context(setting(current_request, request))
            if settings.active and settings.focus:
                request.times = Times.of(inputs.mm_data_items.get(MODALITY))
            if settings.active and settings.stream:
                request.stream = Stream(self._evs_store, ours.get(AFTER_KEY))
            if settings.active and self._evs_watches:
                request.watch = within.enter_context(watching(not self._evs_why_stock, self._evs.squares))
            if settings.active and (threads := self._evs_config.processor_threads) is not None:
                within.enter_context(set_default_torch_num_threads(threads))
            return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        config = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if PLAN_FIELD not in hf_inputs:
            return config
        return {**config, PLAN_FIELD: MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True)}

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Memory is profiled as without EVS: what the tower computes does not shrink, and dummy clips are all ties.
        with setting(profiling, True):
            return super().get_dummy_mm_inputs(*args, **kwargs)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)
        if brings_plans(inputs.mm_data_items.get(MODALITY)):
            # The encoder's identifiers have the settings in them.
            check_identifiers((inputs.mm_uuid_items or {}).get(MODALITY))
            return hashes
        request = current_request.get()
        settings, stream = request.settings, request.stream
        if not settings.active or MODALITY not in hashes:
            for own in filter(looks_pruned, hashes.get(MODALITY, ())):
                raise RequestError(
                    f"A video of this request, for which evs_rate is 0, has the uuid {own!r}: names that end like this "
                    "are those of pruned videos. Give it another uuid, or none."
                )
            return hashes
        own = hashes[MODALITY]
        if request.times is not None:
            own = [f"{each}-at{name}" for each, name in zip(own, request.times.names(), strict=True)]
        if stream is not None:
            stream.links = chain(own, settings.identity, stream.after)
            marks = stream.links[:-1]
        else:
            marks = [hashlib.sha256(settings.identity.encode()).hexdigest()[:16]] * len(own)
        return {**hashes, MODALITY: [cache_identity(*pair) for pair in zip(own, marks, strict=True)]}

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        request = current_request.get()
        if request.stream is not None and MODALITY in mm_hashes:
            cache = request.stream.without(cache, mm_data_items[MODALITY], mm_hashes[MODALITY])
        known, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        if request.times is not None:
            request.times.processed = [number for number, cached in enumerate(known.get(MODALITY, ())) if not cached]
        return known, missing

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        request = current_request.get()
        settings, watch = request.settings, request.watch
        if not updates.get(MODALITY):  # empty when the processor cache has every clip
            return updates
        items = out_mm_kwargs[MODALITY]
        if PLAN_FIELD in items[0]:  # vLLM wants the same fields of all
            planned = [self._as_planned(item, each) for item, each in zip(items, updates[MODALITY], strict=True)]
            return {**updates, MODALITY: planned}
        if not settings.active:
            return updates
        # Embeddings go through no processor.
        seen = watch.seen if watch is not None and watch.seen else [None] * len(items)
        try:
            # One after the other, as in a stream a clip needs what the one before it leaves.
            pruned = [
                self._prune(item, item_updates, settings, video, place)
                for place, (item, item_updates, video) in enumerate(zip(items, updates[MODALITY], seen, strict=True))
            ]
        except (ArithmeticError, LookupError, RuntimeError, PlanError) as error:
            if not hf_processor_mm_kwargs:
                raise
            # Arguments for Hugging Face's processor of which we do not know what they do to the pixels.
            raise RequestError(
                f"EVS cannot read the video that mm_processor_kwargs {sorted(hf_processor_mm_kwargs)} made "
                f"({type(error).__name__}: {error}). Leave them out, or set evs_rate to 0 where the server admits it."
            ) from error
        return {**updates, MODALITY: pruned}

    def _prune(self, item: Any, updates: Any, settings: EVSConfig, seen: Seen | None, place: int) -> Any:
        """Plans one clip, puts the plan among its fields and returns its prompt updates, shortened.

        `place` is where it stands among the clips that are being processed.
        """
        request = current_request.get()
        stream, times = request.stream, request.times
        fields = {key: elem.data for key, elem in item.items()}
        selection = named_selection(settings.selection)
        to_make = seen if seen is not None and not seen.why_stock else None
        judges_pixels = selection.reads_pixels or not self._evs.judges_source
        if to_make is not None:
            of_pixels = self._evs.pixels
            dtype = fields[of_pixels].dtype
            fields[of_pixels] = rows_of(to_make, None, dtype) if judges_pixels else to_make.blank(dtype)
        started = time.perf_counter()
        clip = self._evs.clip(fields)
        if clip is None:
            if not any("embeds" in name for name in fields):
                raise RequestError(
                    "EVS is on, and this request describes a video without its pixels, as encoder-cache and KV "
                    "consumers take it: which tokens the producer kept is not known here. Send the evs_plan of its "
                    "answer with the other fields, or the pixels, or set evs_rate to 0 on both sides where the "
                    "servers admit it."
                )
            logger.warning_once("EVS: precomputed video embeddings have no pixels to compare; they are not pruned.")
            if stream is not None:
                stream.leave(stream.number_of(place), None)
            return updates
        if seen is not None and self._evs.judges_source:
            clip = replace(clip, source=seen.source)
        if times is not None:
            clip = replace(clip, starts=unit_starts(times.of_processed(place), clip))
        try:
            if stream is None:
                plan = make_plan(clip, settings)
            else:
                number = stream.number_of(place)
                clip = clip.after(stream.anchors_before(number))
                plan = make_plan(clip, settings)
                stream.leave(number, selection.anchors(torch.from_numpy(plan.kept), clip, settings))
                rebuilt = number in stream.rebuilt
                metrics().stream_chunks.labels("rebuilt" if rebuilt else news_of(clip, plan)).inc()
        except UnsupportedError as error:
            raise RequestError(str(error)) from None
        span = self._evs.position_span(fields, clip.grid)
        pruned = [replace(u, content=self._pruned_details(u.content, clip, plan, span)) for u in updates]
        plan, *others = (update.content.plan for update in pruned)
        array = plan.to_array()
        if any((other.to_array() != array).any() for other in others):
            raise UnsupportedError("A clip has several ways to be laid out in the prompt; EVS needs exactly one.")
        metrics().planning_time.labels(settings.selection).observe(time.perf_counter() - started)
        metrics().frontend_clips.labels(PATHS[to_make is None]).inc()
        # Pixels that nobody computes need not be made, cached, serialised or copied to the device.
        reuse = plan.encoder == "reuse"
        if to_make is not None and not judges_pixels:
            pixels = {of_pixels: rows_of(to_make, plan.computed if reuse else None, dtype)}
        elif reuse:
            pixels = self._evs.computed_pixels(fields, plan)
        else:
            pixels = {} if to_make is None else {of_pixels: fields[of_pixels]}
        for key, data in pixels.items():
            # Frames that a decoder left on a GPU stay there; vLLM says where pixels go from here.
            item[key] = replace(item[key], data=data.to(item[key].data.device))
        if settings.budget == "causal":
            before = settings.identity if stream is None else stream.links[stream.number_of(place)]
            plan = replace(plan, beginnings=name_beginnings(self._evs, fields | pixels, plan, before))
            pruned = [replace(u, content=replace(u.content, plan=plan)) for u in pruned]
            array = plan.to_array()
        item[PLAN_FIELD] = MultiModalFieldElem(torch.from_numpy(array), MultiModalBatchedField(keep_on_cpu=True))
        return pruned

    def _as_planned(self, item: Any, updates: Any) -> Any:
        """The prompt updates of a clip that another engine encodes, shortened by the plan that came with it."""
        fields = {key: elem.data for key, elem in item.items()}
        pruned = []
        for update in updates:
            stock = update.content
            mask = full_mask(stock)
            plan = given_plan(fields[PLAN_FIELD], stock.full, mask, lambda grid: self._evs.position_span(fields, grid))
            pruned.append(replace(update, content=shortened(stock, plan)))
        return pruned

    def _pruned_details(
        self, stock: PromptUpdateDetails, clip: Clip, plan: RetentionPlan, span: int
    ) -> PrunedUpdateDetails:
        return shortened(stock, plan.with_layout(self._evs.layout(stock.full, full_mask(stock), clip), span))

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        result = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        updates = mm_res.prompt_updates.get(MODALITY, ())
        contents = [item_updates[0].content for item_updates in updates if item_updates]
        plans = [content.plan for content in contents if isinstance(content, PrunedUpdateDetails)]
        if plans:
            request = current_request.get()
            seconds = None if request.stream is None else seconds_of(mm_items[MODALITY], len(updates))
            try:
                check_positions(self._evs, self.info.ctx.model_config, len(result[0]), plans, seconds)
            except RequestError:
                take_back(request.cache, mm_res.hashes[MODALITY])
                raise
            count, selection = metrics(), request.settings.selection
            count.clips.labels(selection).inc(len(plans))
            count.tokens.labels(selection).inc(sum(plan.num_tokens for plan in plans))
            count.tokens_kept.labels(selection).inc(sum(plan.num_kept for plan in plans))
            result = result[0], {**result[1], MODALITY: [placed(info, contents) for info in result[1][MODALITY]]}
        return result
