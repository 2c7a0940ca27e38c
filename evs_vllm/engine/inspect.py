# SPDX-License-Identifier: Apache-2.0
"""Runs one video through the server's own loader and processor, without an engine, and keeps what they made."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.transformers_utils.processor import get_video_processor_cls_name
from vllm.utils.torch_utils import set_default_torch_num_threads

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.focus import unit_weights
from evs_vllm.core.inspection import STAGES, Inspection
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.prompt import pruned_clip
from evs_vllm.core.scorers import Selection, named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.engine import plugin
from evs_vllm.engine.plan_field import MODALITY, plan_of
from evs_vllm.engine.times import unit_starts
from evs_vllm.errors import EVSError, UnsupportedError
from evs_vllm.families import family_of
from evs_vllm.families.seen import Seen
from evs_vllm.families.watched import watching
from evs_vllm.options import CONFIG_KEY


def inspect_clip(
    video: Path,
    model: str,
    config: EVSConfig,
    media_io_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Processes one video as ``vllm serve`` with these settings would.

    Args:
        video: The file.
        model: Model folder or hub name.
        config: The settings; inactive ones keep every token.
        media_io_kwargs: Settings of the video loader (``--media-io-kwargs``, the part under "video").
        trust_remote_code: As for ``vllm serve``.

    Raises:
        EVSError: The model or the video cannot be read, or EVS refuses them.
    """
    plugin.register()  # VLLM_PLUGINS may leave it out
    with _reported(f"load the model {model}"):
        model_config = EngineArgs(
            model=model,
            trust_remote_code=trust_remote_code,
            media_io_kwargs={MODALITY: dict(media_io_kwargs or {})},
            # Which tokens stay does not depend on the encoder, and with "reuse" the pixels of the others are gone.
            additional_config={CONFIG_KEY: config.to_mapping() | {"encoder": "full"}},
        ).create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    with _reported(f"decode {video}"):
        started = time.perf_counter()
        media = _load(video, model_config)
        decode = time.perf_counter() - started
    family = family_of(model_config.architecture)
    assert family is not None  # checked when the model config was made
    adapter = family.bind(processor.info.get_hf_config(), processor=processor.info.get_hf_processor())
    squares = adapter.squares
    with _reported(f"process {video}"), set_default_torch_num_threads(), watching(squares=squares) as watch:
        inputs = _inputs(processor, media)
        # The second run is what a server does: the first one imports and compiles.
        processor.apply(inputs, TimingContext())
        timing = TimingContext()
        item = processor.apply(inputs, timing)["mm_kwargs"].require_data()[MODALITY][0]
    fields = {key: elem.data for key, elem in item.items()}
    clip = adapter.clip(fields)
    if clip is None:
        raise UnsupportedError(f"The processor made no pixels of {video}.")
    clip = replace(
        clip,
        starts=unit_starts(getattr(media, "media", media)[1] or {}, clip),
        source=watch.seen[-1].source if watch.seen and adapter.judges_source else None,
    )
    weights = unit_weights(clip, config)
    frames = adapter.frames(fields)
    plan = plan_of(item) or RetentionPlan(clip.grid, np.arange(np.prod(clip.grid)), config.positions)
    selection = named_selection(config.selection)
    layout = plan.layout
    after = plan.num_kept if layout is None else len(plan.prompt_index)
    return Inspection(
        video=video,
        model=model,
        architecture=model_config.architecture,
        family=family.name,
        config=config,
        plan=plan,
        selection=selection,
        evidence=selection.evidence(clip).cpu().numpy(),
        unit=selection.unit(clip),
        frames=frames,
        unit_seconds=clip.starts,
        prompt_tokens=(plan.num_tokens if layout is None else len(layout.token_ids), after),
        seconds={"decode": decode, "HF processor": timing.stage_secs["apply_hf_processor"]}
        | _planning_seconds(clip, plan, config, selection, adapter)
        | {"pixels": _pixel_seconds(watch.seen, clip, config, adapter, fields[adapter.pixels].dtype)},
        weights=None if weights is None else weights.tolist(),
    )


def inspect_stream(
    chunks: Sequence[tuple[str, float]],
    fps: float,
    model: str,
    config: EVSConfig,
    keys: Mapping[str, Any],
    name: str,
    trust_remote_code: bool = False,
) -> Inspection:
    """Processes the videos of one request as ``vllm serve`` with these settings would, and shows them as one clip.

    Args:
        chunks: URL and start, in seconds, of each video: JPEGs of one size, as a ``data:`` URL.
        fps: Their frames a second.
        model: Model folder or hub name.
        config: The server's settings; inactive ones keep every token.
        keys: The request's ``evs_*`` keys.
        name: What the stream is called.
        trust_remote_code: As for ``vllm serve``.

    Returns:
        The units of all videos in a row. What was scored is not in it: `evidence` is empty.

    Raises:
        EVSError: The model or a video cannot be read, EVS refuses them, or the videos have several sizes.
    """
    plugin.register()
    with _reported(f"load the model {model}"):
        model_config = EngineArgs(
            model=model,
            trust_remote_code=trust_remote_code,
            media_io_kwargs={MODALITY: {"fps": fps, "num_frames": -1}},
            additional_config={CONFIG_KEY: config.to_mapping() | {"encoder": "full", "request_overrides": "any"}},
        ).create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    started = time.perf_counter()
    with _reported(f"decode {name}"):
        connector = MediaConnector(model_config.multimodal_config.media_io_kwargs)
        media = [connector.fetch_video(url) for url, _ in chunks]
    decode = time.perf_counter() - started
    timing = TimingContext()
    with _reported(f"process {name}"), set_default_torch_num_threads():
        inputs = replace(_inputs(processor, *media), hf_processor_mm_kwargs=dict(keys))
        items = processor.apply(inputs, timing)["mm_kwargs"].require_data()[MODALITY]
    family = family_of(model_config.architecture)
    assert family is not None  # checked when the model config was made
    adapter = family.bind(processor.info.get_hf_config(), processor=processor.info.get_hf_processor())
    frames, plans, starts = [], [], []
    for item, (_, start) in zip(items, chunks, strict=True):
        fields = {key: elem.data for key, elem in item.items()}
        clip = adapter.clip(fields)
        if clip is None:
            raise UnsupportedError(f"The processor made no pixels of {name}.")
        frames.append(adapter.frames(fields))
        plans.append(plan_of(item) or RetentionPlan(clip.grid, np.arange(np.prod(clip.grid)), config.positions))
        starts += [start + unit * len(frames[-1]) / clip.num_units / fps for unit in range(clip.num_units)]
    plan = joined(plans)
    return Inspection(
        video=Path(name),
        model=model,
        architecture=model_config.architecture,
        family=family.name,
        config=config,
        plan=plan,
        selection=named_selection(config.selection),
        evidence=np.empty((0, 0), dtype=np.uint8),
        unit=1.0,
        frames=np.concatenate(frames),
        unit_seconds=tuple(starts),
        prompt_tokens=(plan.num_tokens, plan.num_kept),
        seconds=dict.fromkeys(STAGES, 0.0)
        | {"decode": decode, "HF processor": timing.stage_secs.get("apply_hf_processor", 0.0)},
    )


def joined(plans: Sequence[RetentionPlan]) -> RetentionPlan:
    """The plans of clips of one size as that of all their units in a row, without a layout.

    Raises:
        UnsupportedError: They have several sizes.
    """
    if len({plan.grid[1:] for plan in plans}) > 1:
        raise UnsupportedError("The videos have several sizes, so they cannot be shown as one.")
    before = np.cumsum([0, *(plan.num_tokens for plan in plans)])
    kept = np.concatenate([plan.kept + start for plan, start in zip(plans, before)])
    return RetentionPlan((sum(plan.num_units for plan in plans), *plans[0].grid[1:]), kept, plans[0].positions)


def _load(video: Path, model_config: Any) -> Any:
    connector = MediaConnector(
        model_config.multimodal_config.media_io_kwargs, allowed_local_media_path=str(video.resolve().parent)
    )
    return connector.fetch_video(video.resolve().as_uri(), video_processor=get_video_processor_cls_name(model_config))


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turns what vLLM raises into an error of ours; ours stay as they are."""
    try:
        yield
    except EVSError:
        raise
    except Exception as error:
        raise EVSError(f"vLLM cannot {what}: {error or type(error).__name__}") from error


def _inputs(processor: Any, *media: Any) -> ProcessorInputs:
    text = processor.dummy_inputs.get_dummy_text({MODALITY: len(media)})
    prompt = processor.info.get_tokenizer().encode(text, add_special_tokens=False)
    return ProcessorInputs(prompt, processor.info.parse_mm_data({MODALITY: list(media)}))


def _planning_seconds(
    clip: Clip, plan: RetentionPlan, config: EVSConfig, selection: Selection, adapter: Any
) -> dict[str, float]:
    """Medians of the stages that the processor runs in one go."""

    def lay_out() -> None:
        whole = plan.layout
        if whole is not None:
            laid = plan.with_layout(adapter.layout(whole.token_ids.tolist(), whole.is_embed, clip), plan.position_span)
            pruned_clip(laid)
            laid.to_array()

    if not config.active:
        return {"score": 0.0, "select": 0.0, "layout": 0.0}
    score = _median(lambda: selection.evidence(replace(clip)).cpu())  # a copy, which nothing was described of yet
    both = _median(lambda: make_plan(replace(clip), config, selection))
    return {"score": score, "select": max(0.0, both - score), "layout": _median(lay_out)}


def _median(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _pixel_seconds(seen: Sequence[Seen], clip: Clip, config: EVSConfig, adapter: Any, dtype: torch.dtype) -> float:
    """What it takes to make the pixels of the tokens that a server's vision tower would compute."""
    if not seen or seen[-1].why_stock:
        return 0.0
    tokens = make_plan(clip, config.resolve_encoder(adapter.why_not_reuse())).computed
    return _median(lambda: seen[-1].rows(tokens, dtype))


def platform_name() -> str:
    """What vLLM takes this machine for, for example "cuda" or "cpu"."""
    from vllm.platforms import current_platform

    return f"{current_platform.device_type} ({type(current_platform).__name__})"
