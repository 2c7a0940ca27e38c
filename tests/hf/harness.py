# SPDX-License-Identifier: Apache-2.0
"""What the tests of `evs_vllm.hf` are written in: batches as a model's own processor makes them, the comparison."""

import numpy as np
import torch

import evs_vllm.hf as hf
from evs_vllm.testing import synthetic_clip
from tests.reference.hf import Clip, Picture

TOLERANCE = 1e-4
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = 8


def chat(*parts):
    return "<|im_start|>user\n" + "".join(parts) + "<|im_end|>\n<|im_start|>assistant\n"


ASK = chat(VIDEO, "Describe the video.")


def enable(model, *args, **options):
    """`evs_vllm.hf.enable`, with the selection that the reference's `Settings` ask for unless told otherwise."""
    return hf.enable(model, *args, **({"selection": "paper"} | options))


def picture(seed):
    return synthetic_clip(1, (56, 84), "noise", seed=seed)[0]


def inputs(ref, prompts, media, fps=2.0, side="left"):
    """What the model's own processor makes of a batch: one prompt and one list of arrays (clips 4-D) per row."""
    from transformers.video_utils import VideoMetadata

    clips = [m for row in media for m in row if m.ndim == 4]
    images = [m for row in media for m in row if m.ndim == 3]
    meta = [VideoMetadata(total_num_frames=len(c), fps=fps, frames_indices=list(range(len(c)))) for c in clips]
    return ref.processor(
        text=list(prompts),
        videos=[torch.from_numpy(c).permute(0, 3, 1, 2) for c in clips] or None,
        images=[torch.from_numpy(i).permute(2, 0, 1) for i in images] or None,
        video_metadata=meta or None,
        do_sample_frames=False,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


def check(model, ref, prompts, media, settings, fps=2.0, **kwargs):
    """`generate` for a batch gives, row by row, what the reference gives for the row alone."""
    batch = inputs(ref, prompts, media, fps)
    out = model.generate(
        **batch,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    length = batch["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], batch["input_ids"]), "the prompt comes back unpruned"
    kept = [plan.kept for plan in hf.last_plans(model)]
    for row, (prompt, items) in enumerate(zip(prompts, media)):
        described = [Clip(m, fps, settings) if m.ndim == 4 else Picture(m) for m in items]
        expected = ref.generate(prompt, described, TOKENS)
        assert expected.gap > 5 * TOLERANCE, "nearly tied in the reference: use another case"
        for indices in expected.kept:
            assert kept.pop(0).tolist() == indices.tolist()
        assert out.sequences[row, length:].tolist() == expected.tokens
        logprobs = torch.log_softmax(torch.stack([step[row] for step in out.logits]), -1).numpy()
        assert np.abs(logprobs - expected.logprobs).max() <= TOLERANCE
    assert not kept
