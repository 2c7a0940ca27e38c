# SPDX-License-Identifier: Apache-2.0
"""Frames that a decoder left on a GPU are judged and resized there, and become what the same frames become on a CPU.

No GPU is needed: tensors pretend to be on one (`tests.pretend_gpu`), which shows where data go. What the kernels for a
GPU compute is tested in tests/kernels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.families import front_end
from tests.families.facts import Facts
from tests.families.processing import fields_in, pixels_in, plan_in, process, processor_for
from tests.families.registry import families
from tests.families.test_front_end import noise, path_of
from tests.pretend_gpu import GPU, Copied, There, pretended_gpu

pytestmark = [
    pytest.mark.vllm,
    families(lambda facts: facts.makes_frames or not facts.whole_frames),
]

SHAPE = (9, 131, 150)


def takes_tensors(processor: Any) -> bool:
    """Whether the model's processor is one of transformers; vLLM's own take arrays only."""
    video_processor = getattr(processor.info.get_hf_processor(), "video_processor", None)
    return isinstance(video_processor, front_end._WatchedTransformers)


def both_ways(processor: Any, frames: np.ndarray, **kwargs: Any) -> tuple[Any, Any, Copied]:
    """What becomes of frames on the CPU, and on the pretended GPU, with what was copied from there."""
    here = process(processor, frames, **kwargs)
    with pretended_gpu() as copied:
        front_end.why_not_on.cache_clear()
        assert not front_end.why_not_on(GPU)
        copied.sizes.clear()
        there, path = path_of(lambda: process(processor, There(torch.from_numpy(frames)), **kwargs))  # type: ignore[arg-type]
        assert path == "rows"
    front_end.why_not_on.cache_clear()
    return here, there, copied


def assert_same(here: Any, there: Any) -> None:
    assert here["prompt_token_ids"] == there["prompt_token_ids"]
    one, other = fields_in(here), fields_in(there)
    assert one.keys() == other.keys()
    for name, expected in one.items():
        made = other[name].held if isinstance(other[name], There) else other[name]
        if isinstance(expected, torch.Tensor):
            assert made.dtype == expected.dtype and torch.equal(made, expected), name
        else:
            assert made == expected, name


@pytest.mark.parametrize("kept_there", [True, False], ids=["torch_shm", "sockets"])
@pytest.mark.parametrize("encoder", ["auto", "full"])
@pytest.mark.parametrize("chosen", ["learned", "paper"])
def test_frames_on_a_gpu(model: Path, facts: Facts, chosen: str, encoder: str, kept_there: bool) -> None:
    options = {"mm_tensor_ipc": "torch_shm"} if kept_there else {}
    processor = processor_for(model, {"rate": 0.6, "selection": chosen, "encoder": encoder}, **options)
    if not takes_tensors(processor):
        pytest.skip("vLLM's own processor of this model takes arrays only")
    frames = noise(*SHAPE)
    here, there, copied = both_ways(processor, frames)
    assert_same(here, there)
    pixels, plan = pixels_in(there), plan_in(there)
    assert plan is not None and isinstance(pixels, There) == kept_there
    # To the host go lists of tokens, the frames, which vLLM hashes there, and the pixels, where vLLM wants them there.
    sizes = list(copied.sizes)
    for large in (frames.nbytes, *([] if kept_there else [pixels.nbytes])):
        assert large in sizes, (large, sizes)
        sizes.remove(large)
    assert sum(sizes) <= 40 * plan.num_tokens, copied.sizes


@pytest.mark.parametrize(
    "kwargs",
    [
        {"evs_threshold": 12.0, "evs_rate": 0.0},
        {"evs_focus": [[0.5, 1.5, 3.0]]},
        {"evs_stream": True},
        {"evs_min_tokens_per_unit": 2},
        {"evs_max_tokens": 30},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_a_request_asks_for(model: Path, facts: Facts, kwargs: dict[str, Any]) -> None:
    processor = processor_for(model, {"rate": 0.6, "request_overrides": "any"})
    if not takes_tensors(processor):
        pytest.skip("vLLM's own processor of this model takes arrays only")
    here, there, _ = both_ways(processor, noise(*SHAPE), **kwargs)
    assert_same(here, there)


def test_the_budget_that_looks_at_no_later_unit(model: Path, facts: Facts) -> None:
    processor = processor_for(model, {"rate": 0.6, "request_overrides": "any"})
    if not takes_tensors(processor) or not processor._evs_family.grows:
        pytest.skip("this family has no such budget, or takes arrays only")
    here, there, _ = both_ways(processor, noise(*SHAPE), evs_budget="causal")
    assert_same(here, there)


def test_tensors_of_a_decoder_on_the_cpu(model: Path, facts: Facts) -> None:
    """As torchcodec gives them: in the order of arrays."""
    processor = processor_for(model, {"rate": 0.6})
    if not takes_tensors(processor):
        pytest.skip("vLLM's own processor of this model takes arrays only")
    frames = noise(*SHAPE)
    result, path = path_of(lambda: process(processor, torch.from_numpy(frames)))  # type: ignore[arg-type]
    assert path == "rows"
    assert_same(process(processor, frames), result)


def test_a_gpu_that_computes_something_else_is_found_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evs_kernels

    resize = evs_kernels.resize_patches

    def wrong(frames: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = resize(frames, *args, **kwargs)
        return rows + 1 if isinstance(frames, There) else rows

    with pretended_gpu():
        front_end.why_not_on.cache_clear()
        monkeypatch.setattr(evs_kernels, "resize_patches", wrong)
        assert "other pixels" in front_end.why_not_on(GPU)
        processor = processor_for(model, {"rate": 0.6})
        if takes_tensors(processor):
            with front_end.watching(leave_rows=True, squares=processor._evs.squares) as watch:
                watch.unpermuted = True
                video_processor = processor.info.get_hf_processor().video_processor
                why = front_end._why_stock(video_processor, [There(torch.zeros(2, 3, 60, 60))], {}, watch)
            assert "other pixels" in why
    front_end.why_not_on.cache_clear()
    assert "cannot be tried" in front_end.why_not_on(GPU)  # there is none
    assert "the frames are on xpu" in front_end.why_not_on(torch.device("xpu"))
    front_end.why_not_on.cache_clear()
