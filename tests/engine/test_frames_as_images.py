# SPDX-License-Identifier: Apache-2.0
"""A video that is sent as a list of images is not pruned; that is noticed, and what to send instead works."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evs_vllm.testing import synthetic_clip
from tests.families.processing import processor_for
from tests.families.registry import families

pytestmark = [pytest.mark.vllm, families(lambda facts: facts.engine >= 3 and facts.ids_per_second is not None)]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def count() -> float:
    from evs_vllm.engine.metrics import metrics

    return float(metrics().frames_as_images._value.get())


def ask(processor: Any, pictures: list[np.ndarray], **kwargs: Any) -> Any:
    items = processor.info.parse_mm_data({"image": [Image.fromarray(picture) for picture in pictures]})
    return processor(PICTURE * len(pictures) + "Why?", items, hf_processor_mm_kwargs=kwargs)


def test_a_run_of_images_of_one_size_is_said_and_counted(model_dir: Any, family: str, caplog: Any) -> None:
    processor = processor_for(
        model_dir(family), {"rate": 0.5, "request_overrides": "any"}, limit_mm_per_prompt={"image": 8}
    )
    frames = list(synthetic_clip(6, (56, 84)))
    other = synthetic_clip(1, (84, 84))[0]
    before = count()
    ask(processor, frames[:3])
    ask(processor, [*frames[:3], other, *frames[3:]])
    ask(processor, frames, evs_rate=0)
    ask(processor_for(model_dir(family), None, limit_mm_per_prompt={"image": 8}), frames)
    assert count() == before and "images of one size" not in caplog.text
    ask(processor, frames)
    ask(processor, [other, *frames[:4]])
    assert count() == before + 2
    assert caplog.text.count("images of one size") == 1 and "data:video/jpeg;base64" in caplog.text


def test_the_example_of_the_documentation_is_a_video(model_dir: Any, family: str) -> None:
    from vllm.multimodal.media import MediaConnector

    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith('url = "data:video/jpeg;base64,"'))
    jpegs = []
    for frame in synthetic_clip(8, (112, 140), moving=0.3):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG")
        jpegs.append(buffer.getvalue())
    names: dict[str, Any] = {"base64": base64, "jpegs": jpegs}
    exec(line, names)
    media = MediaConnector().fetch_video(names["url"])
    processor = processor_for(model_dir(family), {"rate": 0.5})
    items = processor.info.parse_mm_data({"video": [media]})
    result = processor("<|vision_start|><|video_pad|><|vision_end|>Why?", items)
    assert result["mm_placeholders"]["video"][0].get_num_embeds() == 40  # of 4 units of 20 tokens
