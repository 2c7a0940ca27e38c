# SPDX-License-Identifier: Apache-2.0
"""What a wrong library or dtype would change without a word: the video is seen, and its positions are those of vLLM."""

import copy

import pytest
import torch

import evs_vllm.hf as hf
from evs_vllm.errors import UnsupportedError
from evs_vllm.hf.classes import CLASSES
from evs_vllm.options import SELECTION_NAMES
from evs_vllm.testing import FAMILIES as TINY
from evs_vllm.testing import synthetic_clip
from tests.families.processing import fields_in, plan_in, process, processor_for

CLASS_IDS = [name for name, row in TINY.items() if row.architecture in CLASSES]
TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What moves?<|im_end|>\n"


def test_every_class_has_a_tiny_model() -> None:
    assert {TINY[name].architecture for name in CLASS_IDS} == CLASSES.keys()


def inputs(ref, frames, fps=2.0):
    from transformers.video_utils import VideoMetadata

    meta = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=list(range(len(frames))))
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return ref.processor(
        text=[TEXT], videos=[video], video_metadata=[meta], do_sample_frames=False, return_tensors="pt"
    )


@pytest.mark.families(CLASS_IDS)
@pytest.mark.parametrize("rate", [0, 0.5])
def test_the_logits_depend_on_what_the_tower_returns(reference, family, rate) -> None:
    """An argument that the stock method does not know would be ignored: the model would answer without the video."""
    ref = reference(family)
    model = hf.enable(copy.deepcopy(ref.model), rate, processor=ref.processor, served_positions=True)
    batch = inputs(ref, synthetic_clip(8, (64, 96), moving=0.3))
    with torch.no_grad():
        seen = model(**batch).logits
        visual = model.model.visual
        stock = visual.forward

        def blind(*args, **kwargs):
            out = stock(*args, **kwargs)
            out.pooler_output = torch.zeros_like(out.pooler_output)
            return out

        visual.forward = blind
        unseen = model(**batch).logits
    assert seen.shape == unseen.shape and float((seen - unseen).abs().max()) > 0.1


@pytest.mark.families(["qwen2_5_vl"])
def test_a_transformers_without_the_argument_is_refused(reference, family, monkeypatch) -> None:
    model = copy.deepcopy(reference(family).model)

    def older(self, input_ids=None, pixel_values_videos=None, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(type(model), "forward", older)
    with pytest.raises(UnsupportedError, match=r"mm_encoder_outputs .*5\.18"):
        hf.enable(model, 0.5)


@pytest.mark.vllm
@pytest.mark.families(CLASS_IDS)
@pytest.mark.parametrize("name", SELECTION_NAMES)
def test_the_plan_is_the_one_that_vllm_makes(model_dir, reference, family, facts, name) -> None:
    """From the rows of transformers' own processor as from vLLM's, and by default the same selection."""
    chosen = {} if name == SELECTION_NAMES[0] else {"selection": name}
    server = {"rate": 0.8, "request_overrides": "any", **chosen}
    processor, ref = processor_for(model_dir(family), server), reference(family)
    model = hf.enable(copy.deepcopy(ref.model), 0.8, processor=ref.processor, **chosen)
    for size in facts.frame_size, (75, 213):  # the second is resized
        frames = synthetic_clip(11, size, moving=0.3, noise=3)
        served = plan_in(process(processor, frames))
        with torch.no_grad():
            model(**inputs(ref, frames))
        (plan,) = hf.last_plans(model)
        assert served is not None and plan.kept.tolist() == served.kept.tolist()
    causal = plan_in(process(processor, frames, evs_budget="causal"))
    with torch.no_grad():
        model(**inputs(ref, frames), evs_budget="causal")
    assert causal is not None and hf.last_plans(model)[0].kept.tolist() == causal.kept.tolist()
    # Mixed precision, as in a training step, is for the model and not for what chooses its tokens.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs(ref, frames))
    assert hf.last_plans(model)[0].kept.tolist() == plan.kept.tolist()


@pytest.mark.vllm
@pytest.mark.families(CLASS_IDS)
def test_a_stream_is_the_one_that_vllm_makes(model_dir, reference, family, facts) -> None:
    from transformers.video_utils import VideoMetadata

    from tests.families.test_streams import ask, pieces, plans_in

    clips, ref = pieces(facts), reference(family)
    served = plans_in(ask(processor_for(model_dir(family), {"rate": 0.6, "encoder": "full"}), clips))
    model = hf.enable(copy.deepcopy(ref.model), 0.6, processor=ref.processor, stream=True)
    batch = ref.processor(
        text=[TEXT * len(clips)],
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips],
        video_metadata=[
            VideoMetadata(total_num_frames=len(c), fps=2.0, frames_indices=list(range(len(c)))) for c in clips
        ],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        model(**batch)
        plans = hf.last_plans(model)
        assert [(p.kept.tolist(), p.unchanged) for p in plans] == [(p.kept.tolist(), p.unchanged) for p in served]
        assert plans[1].num_kept == 1
        model(**batch, evs_stream=False)
        assert hf.last_plans(model)[1].num_kept > facts.per_unit
        ids = torch.cat([batch["input_ids"]] * 2)
        with pytest.raises(UnsupportedError, match=r"A stream is one conversation, and this batch has 2"):
            model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.vllm
@pytest.mark.families(["qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fps", [1.5, 2.997, 23.976, 29.97])
def test_positions_of_odd_frame_rates_are_those_that_vllm_serves(model_dir, reference, family, dtype, fps) -> None:
    """Of a clip of 100 units; vLLM rounds the seconds per unit to the model's dtype."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from evs_vllm.engine import compat

    frames = synthetic_clip(200, (56, 56), moving=0.3)
    processor = processor_for(model_dir(family), None, dtype=str(dtype).removeprefix("torch."))
    served = process(processor, frames, fps_of_clip=fps)
    seconds = fields_in(served)["second_per_grid_ts"]
    assert seconds.dtype == dtype
    feature = MultiModalFeatureSpec(
        served["mm_kwargs"]["video"][0], "video", "x", served["mm_placeholders"]["video"][0]
    )
    cls = compat.stock_model_class(processor.info.ctx.model_config.architecture)
    stock = cls.__new__(cls)  # without its weights
    torch.nn.Module.__init__(stock)
    stock.config = processor.info.get_hf_config()
    expected, _ = stock.get_mrope_input_positions(served["prompt_token_ids"], [feature])

    ref = reference(family)
    model = hf.enable(copy.deepcopy(ref.model).to(dtype), 0, served_positions=True)
    batch = inputs(ref, frames, fps)
    batch["input_ids"] = torch.tensor([served["prompt_token_ids"]])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch.pop("mm_token_type_ids", None)
    batch["second_per_grid_ts"] = [2 / fps]  # Python's float, as the processor made it
    with torch.no_grad():
        model(**batch)
    assert torch.equal(hf.last_batch(model).positions[:, 0], expected)
