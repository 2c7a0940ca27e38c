# SPDX-License-Identifier: Apache-2.0
"""InternVL, LLaVA, Gemma 4, Ovis without an engine: scores are those of a token's pixels, its tower row sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import pixel_change
from evs_vllm.errors import ConfigError, RequestError
from evs_vllm.families import family_of
from evs_vllm.families.base import PixelStats
from evs_vllm.families.internvl import InternVLChat
from evs_vllm.families.llava import LlavaOnevision
from evs_vllm.families.plain_vit import packed_frames
from evs_vllm.testing import synthetic_clip
from tests.reference.families import reference_for
from tests.reference.hf import Clip

pytestmark = pytest.mark.vllm

WHOLE = {"rate": 0.5, "encoder": "full"}  # with "reuse" the pixels of other tokens are gone
SIZES = {
    "internvl": (112, 112), "internvl_chat": (112, 112), "llava_onevision": (104, 104), "llava_next_video": (64, 64),
    "gemma4": (84, 120), "gemma4_unified": (84, 120), "ovis2_5": (448, 448),
}  # fmt: skip
"""Height and width of a frame that reaches the model without resizing."""
GRIDS = {"gemma4": (7, 10), "gemma4_unified": (7, 10)}
"""Rows and columns of tokens of such a frame, where it is not 4 x 4."""


@pytest.fixture(scope="module", params=SIZES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def processor_for(model: Path, evs: dict[str, Any] | None, **kwargs: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from evs_vllm.engine.plugin import register

    register()
    options = {"max_model_len": 4096, "dtype": "float32", "trust_remote_code": True} | kwargs
    args = EngineArgs(model=str(model), additional_config={} if evs is None else {"evs": evs}, **options)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


@pytest.fixture(scope="module")
def processor(model_dir: Callable[[str], Path], family: str) -> Any:
    return processor_for(model_dir(family), WHOLE)


def process(processor: Any, frames: np.ndarray, **mm_kwargs: Any) -> Any:
    count = len(frames)
    metadata = {
        "fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count)),
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip
    items = processor.info.parse_mm_data({"video": [(frames, metadata)]})
    video = processor.dummy_inputs.get_dummy_text({"video": 1}).strip()
    return processor(f"Look: {video}\nWhat moves?", items, hf_processor_mm_kwargs=mm_kwargs)


def clip_of(processor: Any, frames: np.ndarray) -> Any:
    return clip_of_fields(processor, fields_of(processor, frames))


def clip_of_fields(processor: Any, fields: dict[str, Any]) -> Any:
    adapter = adapter_of(processor)
    return adapter.clip(fields, processor.info.get_hf_config(), adapter.pixel_stats(processor.info.get_hf_processor()))


def adapter_of(processor: Any) -> Any:
    family = family_of(processor.info.ctx.model_config.architecture)
    assert family is not None
    return family.load_adapter()


def fields_of(processor: Any, frames: np.ndarray) -> dict[str, Any]:
    return {key: elem.data for key, elem in process(processor, frames)["mm_kwargs"]["video"][0].items()}


def tokens_under(family: str, pixel: int) -> list[int]:
    """Along one side of a frame, the tokens whose pixels hold `pixel`, written down by hand."""
    if family == "llava_onevision":  # 7 patches of 14 and 6 pixels: tokens of patches 0-1, 2-3, 3-4 and 5-6
        return [[0], [0], [1], [1, 2], [2], [3], [3], []][pixel // 14]
    return [pixel // {"gemma4": 12, "gemma4_unified": 12, "llava_next_video": 16, "ovis2_5": 112}.get(family, 28)]


def test_a_painted_pixel_changes_the_score_of_its_token_and_no_other(processor: Any, family: str) -> None:
    height, width = SIZES[family]
    frames = np.full((5, height, width, 3), 100, dtype=np.uint8)
    rng = np.random.default_rng()
    for _ in range(12):
        t, top, left = int(rng.integers(1, 5)), int(rng.integers(height)), int(rng.integers(width))
        painted = frames.copy()
        painted[t, top, left, int(rng.integers(3))] = 137
        clip = clip_of(processor, painted)
        assert clip.grid == (5, *GRIDS.get(family, (4, 4))) and clip.tokens.dtype == torch.uint8
        expected = np.zeros(clip.grid, dtype=np.int64)
        for row in tokens_under(family, top):
            for column in tokens_under(family, left):
                expected[t : t + 2, row, column] = 37
        assert pixel_change(clip.tokens).view(clip.grid).tolist() == expected.tolist(), (t, top, left)


def test_the_rows_of_the_tower_are_the_tokens(model_dir: Callable[[str], Path], processor: Any, family: str) -> None:
    """With its attention silenced, row i of the tower answers to the pixels that are compared for token i alone."""
    reference = reference_for(model_dir(family))
    reference.silence_attention()
    height, width = SIZES[family]
    frames = synthetic_clip(3, (height, width), "noise", seed=1)
    before, grid, _ = reference.see_clip(Clip(frames))
    one = clip_of(processor, frames)
    assert one.grid == grid == (3, *GRIDS.get(family, (4, 4)))
    rng = np.random.default_rng()
    changed_once = np.zeros(grid, dtype=bool)
    for _ in range(10):
        t, top, left = int(rng.integers(3)), int(rng.integers(height)), int(rng.integers(width))
        painted = frames.copy()
        painted[t, top, left] = 255 - painted[t, top, left]
        after, _, _ = reference.see_clip(Clip(painted))
        changed = (after - before).abs().amax(dim=1)[reference.lead :][: int(np.prod(grid))]
        rows = changed.view(grid) > 0
        pixels = (clip_of(processor, painted).tokens != one.tokens).any(dim=-1).view(grid)
        assert rows.tolist() == pixels.tolist(), (t, top, left)
        changed_once |= rows.numpy()
    assert changed_once.any()


def test_frames_come_back_as_they_went_in(processor: Any, family: str) -> None:
    frames = synthetic_clip(3, SIZES[family], "noise", seed=2)
    adapter = adapter_of(processor)
    stats = adapter.pixel_stats(processor.info.get_hf_processor())
    shown = adapter.frames(fields_of(processor, frames), processor.info.get_hf_config(), stats)
    assert shown.shape == frames.shape and (shown == frames).all()


def test_first_pixel_shuffle_swaps_rows_and_columns(model_dir: Callable[[str], Path]) -> None:
    processor = processor_for(model_dir("internvl_chat"), WHOLE, hf_overrides={"ps_version": "v1"})
    frames = np.full((2, 112, 112, 3), 100, dtype=np.uint8)
    frames[1, 60, 5] = 137  # row 2, column 0
    changed = pixel_change(clip_of(processor, frames).tokens)[1]
    assert changed.nonzero().flatten().tolist() == [0 * 4 + 2]
    assert isinstance(adapter_of(processor), InternVLChat)
    # That is where the model puts it: the same shuffle on the numbers of the patches.
    from vllm.model_executor.models.internvl import InternVLChatModel

    patches = torch.zeros(1, 8, 8, 1)
    patches[0, 60 // 14, 5 // 14] = 1

    class Model:
        ps_version = "v1"

    shuffled = InternVLChatModel.pixel_shuffle(Model(), patches)  # type: ignore[arg-type]
    assert shuffled.reshape(16, 4).sum(dim=1).nonzero().flatten().tolist() == [2]


def test_released_llava_onevision_reads_pairs_of_patches() -> None:
    """27 x 27 patches to 14 x 14: a token's block is where bilinear resizing reads, found by resizing itself."""

    class Config:
        class vision_config:
            image_size, patch_size = 384, 14

    starts, block = LlavaOnevision().block_starts(Config)
    read = torch.nn.functional.interpolate(torch.eye(27)[None], size=14, mode="linear")[0]  # (source, target)
    assert block == 28
    for token, start in enumerate(starts):
        assert read[:, token].nonzero().flatten().tolist() == [start // 14, start // 14 + 1]


def test_half_precision_pixels_are_near(model_dir: Callable[[str], Path]) -> None:
    """bfloat16 rounds normalised pixels to about two grey levels, before they reach us."""
    frames = synthetic_clip(3, (112, 112), "noise", seed=3)
    processor = processor_for(model_dir("internvl"), WHOLE, dtype="bfloat16")
    assert fields_of(processor, frames)["pixel_values_videos"].dtype == torch.bfloat16
    exact = clip_of(processor_for(model_dir("internvl"), WHOLE), frames).tokens.int()
    assert (clip_of(processor, frames).tokens.int() - exact).abs().max() <= 2


def test_clip_longer_than_the_models_positions_is_refused(model_dir: Callable[[str], Path]) -> None:
    """As long as the prompt fits unpruned, whatever the context length; then not, unless numbered sequentially."""
    evs = {"rate": 0.9, "request_overrides": "any"}
    processor = processor_for(model_dir("llava_next_video"), evs, hf_overrides=SHORT, max_model_len=512)
    text = len(process(processor, synthetic_clip(1, (64, 64)))["prompt_token_ids"]) - 16
    most = (512 - 32 - 1 - text) // 16
    process(processor, synthetic_clip(most, (64, 64)))
    with pytest.raises(RequestError, match=r"the model has 512.*'sequential'"):
        process(processor, synthetic_clip(most + 1, (64, 64)))
    process(processor, synthetic_clip(most + 1, (64, 64)), evs_positions="sequential")


SHORT = {"text_config": {"max_position_embeddings": 512}}


def test_off_sets_nothing(model_dir: Callable[[str], Path], family: str) -> None:
    config = processor_for(model_dir(family), None).info.ctx.model_config
    assert not config.uses_mrope and not hasattr(config.hf_config, "mrope_section")
    on = processor_for(model_dir(family), {"rate": 0}).info.ctx.model_config
    assert on.uses_mrope and on.hf_config.mrope_section[1:] == [0, 0]
    assert on.hf_text_config.to_dict() == config.hf_text_config.to_dict(), "another language model would be built"


def test_statistics_of_the_own_format_are_those_of_its_processor() -> None:
    from vllm.transformers_utils.processors.internvl import IMAGENET_MEAN, IMAGENET_STD

    assert InternVLChat().pixel_stats(None) == PixelStats(IMAGENET_MEAN, IMAGENET_STD)


def test_pixels_that_nobody_computes_do_not_travel(model_dir: Callable[[str], Path]) -> None:
    for name in ("internvl", "internvl_chat", "llava_next_video"):
        frames = synthetic_clip(8, SIZES[name], moving=0.2, seed=4)
        pixels = adapter_of(whole := processor_for(model_dir(name), WHOLE)).pixels
        for options, expected in (({"encoder_refresh": 0}, 4), ({"encoder_refresh": 2}, 6)):
            processor = processor_for(model_dir(name), {"rate": 0.5} | options)
            fields = fields_of(processor, frames)
            plan = RetentionPlan.from_array(fields["evs_plan"].numpy())
            assert plan.encoder == "reuse" and len(fields[pixels]) == packed_frames(plan) <= expected
            kept = clip_of(whole, frames).tokens.flatten(0, 1)[torch.from_numpy(plan.computed)]
            assert torch.equal(clip_of_fields(processor, fields).tokens.flatten(0, 1)[: len(kept)], kept)


def test_reuse_is_refused_where_it_would_be_wrong(model_dir: Callable[[str], Path]) -> None:
    for name, options, reason in (
        ("internvl_chat", {"hf_overrides": {"ps_version": "v1"}}, "pixel shuffle"),
        ("llava_onevision", {}, "not supported"),
        ("llava_next_video", {"hf_overrides": {"vision_feature_select_strategy": "full"}}, "class token"),
        ("llava_next_video", {"hf_overrides": {"spatial_pool_stride": 3}}, "leaves out"),
    ):
        with pytest.raises(ConfigError, match=reason):
            processor_for(model_dir(name), {"rate": 0.5, "encoder": "reuse"}, **options)
