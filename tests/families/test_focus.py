# SPDX-License-Identifier: Apache-2.0
"""A focus in a request: where a client looks, in seconds of the video."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evs_vllm.errors import RequestError
from evs_vllm.families import family_of
from tests.families.facts import Facts
from tests.families.processing import (
    UNITS,
    arguments_for,
    metadata_for,
    plan_in,
    process,
    processor_for,
    prompt_for,
)
from tests.families.registry import families

pytestmark = [pytest.mark.vllm, families(lambda facts: True)]


@pytest.mark.parametrize("cached", [False, True])
def test_a_focus_looks_at_the_times_of_the_loader(model: Path, clip: np.ndarray, facts: Facts, cached: bool) -> None:
    """At a hundredth of the frame rate the same seconds are other units; without times there is nothing to look at."""
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    processor = processor_for(model, {"rate": 0.75, "encoder": "full"})
    config = arguments_for(model, None).create_engine_config()
    cache = processor_only_cache_from_config(config) if cached else None
    plain = plan_in(process(processor, clip))
    last = [[(len(clip) - 1) / 2, 10**6, 64]]
    both = [process(processor, clip, cache, evs_focus=last, fps_of_clip=fps) for fps in (2.0, 200.0)]
    # The same frames at other times keep other tokens, so they are another clip to every cache.
    assert both[0]["mm_hashes"] != both[1]["mm_hashes"]
    looked, past = map(plan_in, both)
    assert plain is not None and looked is not None and past is not None
    assert plain.num_kept == looked.num_kept == past.num_kept
    assert looked.counts[-1] >= plain.counts[-1] and looked.counts[-1] == max(looked.counts[1:])
    assert past.kept.tolist() == plain.kept.tolist()
    row = family_of(processor.info.ctx.model_config.architecture)
    assert row is not None
    if "timestamps" in row.layout:
        return  # without times, Hugging Face's processor of such a family refuses the clip itself
    untimed = {"fps": 2.0, "total_num_frames": len(clip), "video_backend": "opencv", "do_sample_frames": False}
    items = processor.info.parse_mm_data({"video": [(clip, untimed)]})
    with pytest.raises(RequestError, match="needs to know when the clip's units begin"):
        processor(prompt_for(processor), items, cache=cache, hf_processor_mm_kwargs={"evs_focus": last})


@families(lambda facts: not facts.one_clip)
def test_clips_beside_each_other_are_looked_at_by_their_own_times(model: Path, clip: np.ndarray) -> None:
    """Also where the processor cache has the first of them already."""
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.75, "encoder": "full"}).create_engine_config()
    processor = processor_for(model, {"rate": 0.75, "encoder": "full"})
    last = [[(len(clip) - 1) / 2, 10**6, 64]]
    other = clip[:, ::-1].copy()

    def ask(cache: Any) -> list[list[int]]:
        media = [(clip, metadata_for(clip, 2.0)), (other, metadata_for(other, 200.0))]
        text = str(processor.dummy_inputs.get_dummy_text({"video": 2}))
        items = processor.info.parse_mm_data({"video": media})
        result = processor(text, items, cache=cache, hf_processor_mm_kwargs={"evs_focus": last})
        ranges = result["mm_placeholders"]["video"]
        return [list(result["mm_hashes"]["video"]), [each.length for each in ranges]]

    cache = processor_only_cache_from_config(config)
    process(processor, clip, cache, evs_focus=last, fps_of_clip=2.0)
    kept = plan_in(process(processor, other, evs_focus=last, fps_of_clip=200.0))
    assert ask(cache) == ask(None) and kept is not None
    items = processor.info.parse_mm_data({"video": [(other, metadata_for(other, 200.0))]})
    alone = processor(prompt_for(processor), items, cache=cache, hf_processor_mm_kwargs={"evs_focus": last})
    assert plan_in(alone).kept.tolist() == kept.kept.tolist()  # type: ignore[union-attr]


@families(lambda facts: not facts.whole_frames and not facts.one_clip)
def test_a_focus_on_frames_that_the_processor_samples_is_refused(model: Path, clip: np.ndarray) -> None:
    """Which of the loader's frames it takes is not known here."""
    refused = 0
    processor = processor_for(model, {"rate": 0.75, "encoder": "full"})
    for kwargs in ({"do_sample_frames": True, "fps": 1.0}, {"do_sample_frames": True, "num_frames": 4}):
        try:
            plan = plan_in(process(processor, clip, **kwargs))
        except Exception:  # this family's processor takes no such arguments
            continue
        assert plan is not None
        if plan.num_units == UNITS:
            continue  # it took all of them
        with pytest.raises(RequestError, match="when the clip's units begin"):
            process(processor, clip, evs_focus=[[0, 1, 4]], **kwargs)
        refused += 1
    assert refused or "omni" in model.name, "but for Omni, whose processor takes no such arguments"
