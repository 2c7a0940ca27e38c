# SPDX-License-Identifier: Apache-2.0
"""The model families: one table, read by the plugin, the tests, ``evs-vllm families`` and the README.

A new family is one small adapter file plus one row here (CONTRIBUTING.md, "Add a family"). This module imports neither
torch nor vLLM.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evs_vllm.families.base import FamilyAdapter


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: Short name, also the test id.
        architectures: Values of ``architectures`` in config.json that it serves.
        adapter: "module:Class" of its `FamilyAdapter`.
        positions: The position scheme of the language model.
        layout: How the clip lies in the prompt.
        reuse: Whether its vision tower can reuse keys and values (``--evs-encoder reuse``).
        proof: What its end-to-end tests compare with.
        limits: What does not work, or "".
    """

    name: str
    architectures: tuple[str, ...]
    adapter: str
    positions: str
    layout: str
    reuse: bool
    proof: str
    limits: str = ""

    def load_adapter(self) -> "FamilyAdapter":
        module, name = self.adapter.split(":")
        adapter: FamilyAdapter = getattr(import_module(module), name)()
        return adapter


FAMILIES: tuple[Family, ...] = (
    Family(
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        "evs_vllm.families.qwen2_vl:Qwen2VL",
        "M-RoPE (t, h, w), t in real time",
        "contiguous",
        True,
        "Hugging Face reference",
    ),
    Family(
        "Qwen2-VL",
        ("Qwen2VLForConditionalGeneration",),
        "evs_vllm.families.qwen2_vl:Qwen2VL",
        "M-RoPE (t, h, w)",
        "contiguous",
        True,
        "Hugging Face reference",
    ),
    Family(
        "Qwen3-VL",
        ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        "evs_vllm.families.qwen3_vl:Qwen3VL",
        "interleaved M-RoPE (t, h, w)",
        "per unit, between timestamps",
        True,
        "Hugging Face reference",
    ),
    Family(
        "Qwen3.5",
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        "evs_vllm.families.qwen3_vl:Qwen3VL",
        "interleaved M-RoPE (t, h, w)",
        "per unit, between timestamps",
        True,
        "Hugging Face reference",
        "linear attention was run in fp32 by the tests, not by a kernel of vLLM's",
    ),
    Family(
        "GLM-4.1V",
        ("Glm4vForConditionalGeneration",),
        "evs_vllm.families.glm4v:GLM4V",
        "M-RoPE (t, h, w)",
        "per unit, between timestamps",
        True,
        "Hugging Face reference",
        "one video per request, which is vLLM's limit; 4.6V-Flash, this model with GLM-4.6V's processor, was not run",
    ),
    Family(
        "GLM-4.5V, 4.6V",
        ("Glm4vMoeForConditionalGeneration",),
        "evs_vllm.families.glm4v:GLM4V",
        "M-RoPE (t, h, w)",
        "per unit, between timestamps",
        True,
        "Hugging Face reference",
        "one video per request, which is vLLM's limit",
    ),
    Family(
        "InternVL-HF",
        ("InternVLForConditionalGeneration",),
        "evs_vllm.families.internvl:InternVLNative",
        "1-D RoPE",
        "text and brackets around each frame",
        True,
        "Hugging Face reference",
    ),
    Family(
        "InternVL",
        ("InternVLChatModel",),
        "evs_vllm.families.internvl:InternVLChat",
        "1-D RoPE",
        "text and brackets around each frame",
        True,
        "Hugging Face reference",
        "video only where vLLM has it: Qwen2, Qwen3 and GPT-OSS language models",
    ),
    Family(
        "LLaVA-OneVision",
        ("LlavaOnevisionForConditionalGeneration",),
        "evs_vllm.families.llava:LlavaOnevision",
        "1-D RoPE",
        "contiguous, then a newline",
        False,
        "Hugging Face reference",
        "no encoder reuse: its resizing mixes neighbouring patches",
    ),
    Family(
        "LLaVA-NeXT-Video",
        ("LlavaNextVideoForConditionalGeneration",),
        "evs_vllm.families.llava:LlavaNextVideo",
        "1-D RoPE",
        "contiguous",
        True,
        "Hugging Face reference",
        "one video a prompt, no images (vLLM's)",
    ),
    Family(
        "Qwen2.5-Omni",
        ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"),
        "evs_vllm.families.omni:Qwen2_5Omni",
        "M-RoPE (t, h, w), t in real time",
        "contiguous",
        True,
        "Hugging Face reference",
        "the thinker; `use_audio_in_video` is refused for a video that is pruned",
    ),
    Family(
        "Qwen3-Omni",
        ("Qwen3OmniMoeForConditionalGeneration",),
        "evs_vllm.families.omni:Qwen3Omni",
        "interleaved M-RoPE (t, h, w), t in real time",
        "contiguous",
        True,
        "Hugging Face reference",
        "the thinker; `use_audio_in_video` is refused for a video that is pruned",
    ),
    Family(
        "Gemma 4",
        ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "evs_vllm.families.gemma4:Gemma4",
        "1-D RoPE",
        "text and brackets around each frame",
        False,
        "Hugging Face reference",
        "no encoder reuse: its tower takes whole frames only; attention within a frame in both directions "
        "(`use_bidirectional_attention`) was not run, vLLM's CPU engine has none",
    ),
    Family(
        "Ovis2.5",
        ("Ovis2_5",),
        "evs_vllm.families.ovis:Ovis25",
        "1-D RoPE",
        "contiguous, between two indicators",
        False,
        "Hugging Face language model, tower written down in the tests",
        "one video a prompt (vLLM's); no encoder reuse yet",
    ),
)


def family_of(architecture: str) -> Family | None:
    """The row that serves `architecture`, if any."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)


def supported_architectures() -> tuple[str, ...]:
    """Every architecture of the table, in its order."""
    return tuple(arch for family in FAMILIES for arch in family.architectures)
