# SPDX-License-Identifier: Apache-2.0
"""Audio of the Omni families beside a clip, or inside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evs_vllm.errors import RequestError, UnsupportedError
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import fields_in, plan_in, processor_for
from tests.families.registry import families

pytestmark = [pytest.mark.vllm, families(lambda facts: facts.audio)]


def test_audio_in_video_is_refused_where_the_clip_would_be_pruned(model_dir: Any, family: str, facts: Facts) -> None:
    model: Path = model_dir(family)

    def ask(processor: Any, audio: bool = True, video: bool = True, **mm_kwargs: Any) -> Any:
        clip = synthetic_clip(frames=8, size=facts.frame_size, moving=0.2)
        samples = (np.random.default_rng(1).standard_normal(20000) / 10).astype(np.float32)
        media = {"video": [clip]} if video else {}
        if audio:
            media["audio"] = [(samples, 16000)]
        text = "<|vision_start|><|video_pad|><|vision_end|>" if video else "<|audio_start|><|audio_pad|><|audio_end|>"
        items = processor.info.parse_mm_data(media)
        return processor(text + "What is that?", items, hf_processor_mm_kwargs=mm_kwargs)

    on, off = processor_for(model, {"rate": 0.75, "request_overrides": "any"}), processor_for(model, None)
    with pytest.raises(RequestError, match="use_audio_in_video"):
        ask(on, use_audio_in_video=True)
    assert plan_in(ask(on, audio=False, use_audio_in_video=False)) is not None
    ask(on, video=False, use_audio_in_video=True)  # without a clip it means nothing

    # Not pruned, it is vLLM's: audio and clip share their place in the prompt, in turns.
    one, other = ask(on, use_audio_in_video=True, evs_rate=0), ask(off, use_audio_in_video=True)
    assert one["prompt_token_ids"] == other["prompt_token_ids"] and one["mm_hashes"] == other["mm_hashes"]
    assert plan_in(one) is None and fields_in(one)["use_audio_in_video"]
    for kind in "video", "audio":
        (a,), (b,) = one["mm_placeholders"][kind], other["mm_placeholders"][kind]
        assert (a.offset, a.length) == (b.offset, b.length) and a.is_embed.tolist() == b.is_embed.tolist()

    with pytest.raises(UnsupportedError, match="use_audio_in_video"):
        processor_for(model, {"rate": 0.75}, mm_processor_kwargs={"use_audio_in_video": True})
