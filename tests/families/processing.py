# SPDX-License-Identifier: Apache-2.0
"""vLLM's processor of a tiny model, with EVS or without: what it makes of a clip, and what our adapter sees in that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families import family_of
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.testing import synthetic_clip

WHOLE = {"rate": 0.5, "encoder": "full"}
"""Settings with which all pixels travel, those of dropped tokens, too."""

UNITS = 8
"""Temporal units of the clip that tests share."""


def processor_for(model: Path, evs: dict[str, Any] | None, **kwargs: Any) -> Any:
    """A new processor; `kwargs` are arguments of the engine."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(arguments_for(model, evs, **kwargs).create_model_config())


def arguments_for(model: Path, evs: dict[str, Any] | None, **kwargs: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from evs_vllm.engine.plugin import register

    register()
    # float32 pixels, so that what vLLM normalises on the host can be undone exactly.
    options = {"max_model_len": 4096, "dtype": "float32", "trust_remote_code": True} | kwargs
    return EngineArgs(model=str(model), additional_config={} if evs is None else {"evs": evs}, **options)


def prompt_for(processor: Any) -> str:
    video = str(processor.dummy_inputs.get_dummy_text({"video": 1})).strip()
    return f"Look: {video}\nWhat moves?"


def metadata_for(frames: np.ndarray, fps: float = 2.0) -> dict[str, Any]:
    """What vLLM's loader says of a clip of which it gives every frame."""
    count = len(frames)
    return {
        "fps": fps, "duration": count / fps, "total_num_frames": count, "frames_indices": list(range(count)),
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip


def process(processor: Any, frames: np.ndarray, cache: Any = None, fps_of_clip: float = 2.0, **mm_kwargs: Any) -> Any:
    """What the processor makes of a prompt with one clip; `mm_kwargs` are the request's."""
    items = processor.info.parse_mm_data({"video": [(frames, metadata_for(frames, fps_of_clip))]})
    return processor(prompt_for(processor), items, hf_processor_mm_kwargs=mm_kwargs, cache=cache)


def fields_in(result: Any) -> dict[str, Any]:
    """The processed fields of the clip."""
    return {key: elem.data for key, elem in result["mm_kwargs"]["video"][0].items()}


def plan_in(result: Any) -> RetentionPlan | None:
    array = fields_in(result).get("evs_plan")
    return None if array is None else RetentionPlan.from_array(array.numpy())


def pixels_in(result: Any) -> Any:
    """The clip's field of pixels, whatever its name."""
    (pixels,) = (data for name, data in fields_in(result).items() if "pixel_values" in name)
    return pixels


def adapter_for(processor: Any) -> FamilyAdapter:
    """The family's adapter for the processor's model."""
    family = family_of(processor.info.ctx.model_config.architecture)
    assert family is not None
    return family.bind(processor.info.get_hf_config(), processor=processor.info.get_hf_processor())


def clip_in(processor: Any, result: Any) -> Clip:
    """The pixels that are compared, of a clip that `processor` made."""
    clip = adapter_for(processor).clip(fields_in(result))
    assert clip is not None
    return clip


def check_beside_each_other(model: Path, stock: Any, same_fields: Callable[..., None]) -> None:
    """Clips beside each other and an image are made as alone, in whatever order the processor cache sees them.

    Args:
        model: Of a family that takes several clips and images.
        stock: vLLM's own processor of it.
        same_fields: Compares what two processors made of a prompt: their results, ``item=`` the clip's number.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    one, two = synthetic_clip(6, (97, 150), seed=1), synthetic_clip(9, (130, 90), seed=2)
    picture = Image.fromarray(synthetic_clip(1, (70, 90), seed=3)[0])

    def ask(processor: Any, clips: list[np.ndarray], images: list[Any], cache: Any = None) -> Any:
        media = {"video": [(clip, metadata_for(clip)) for clip in clips]} | ({"image": images} if images else {})
        text = processor.dummy_inputs.get_dummy_text({"video": len(clips), "image": len(images)})
        return processor(str(text), processor.info.parse_mm_data(media), cache=cache)

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    for order in ([one], [one, two], [two, one, two], [two]):
        cache = processor_only_cache_from_config(config)
        processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        ask(processor, order[:1], [], cache)  # the first one is a hit later on
        for _ in range(2):
            result, expected = ask(processor, order, [picture], cache), ask(stock, order, [picture])
            fresh = ask(processor, order, [picture])
            assert result["prompt_token_ids"] == fresh["prompt_token_ids"]
            for item in range(len(order)):
                if result["mm_kwargs"]["video"][item] is not None:
                    same_fields(result, expected, item=item)
                same_fields(fresh, expected, item=item)
            (image,), (other,) = ([dict(i) for i in r["mm_kwargs"]["image"] if i] for r in (fresh, expected))
            assert all(torch.equal(image[name].data, other[name].data) for name in other)
