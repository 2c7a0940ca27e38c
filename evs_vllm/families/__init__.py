# SPDX-License-Identifier: Apache-2.0
"""The model families: one table, read by the plugin, the tests, ``evs-vllm families`` and the documentation.

A new family is one small adapter file plus one row here (docs/add-a-family.md). This module imports neither
torch nor vLLM.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evs_vllm.families.base import FamilyAdapter, PixelStats


@dataclass(frozen=True, kw_only=True)
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
        grows: Why keys and values of a clip's beginning do not depend on what comes later, so that vLLM's prefix cache
            may use them again for a clip that has grown; "" where that is not known, and ``--evs-budget causal`` is
            refused.
        limits: What does not work, or "".
    """

    name: str
    architectures: tuple[str, ...]
    adapter: str
    positions: str
    layout: str
    reuse: bool
    proof: str
    grows: str = ""
    limits: str = ""

    def bind(self, hf_config: Any, *, processor: Any = None, stats: "PixelStats | None" = None) -> "FamilyAdapter":
        """The family's adapter for one model; see `FamilyAdapter` for the arguments."""
        module, name = self.adapter.split(":")
        adapter: FamilyAdapter = getattr(import_module(module), name)(hf_config, processor, stats)
        return adapter


_UNITS_ALONE = "its tower attends within a unit and reuses what came before; positions count from the clip's start"
_UNITS_BETWEEN_TEXT = _UNITS_ALONE + "; each unit has its text before it"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="Qwen2.5-VL",
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        adapter="evs_vllm.families.qwen2_vl:Qwen2VL",
        positions="M-RoPE (t, h, w), t in real time",
        layout="contiguous",
        reuse=True,
        grows=_UNITS_ALONE,
        proof="Hugging Face reference",
    ),
    Family(
        name="Qwen2-VL",
        architectures=("Qwen2VLForConditionalGeneration",),
        adapter="evs_vllm.families.qwen2_vl:Qwen2VL",
        positions="M-RoPE (t, h, w)",
        layout="contiguous",
        reuse=True,
        grows=_UNITS_ALONE,
        proof="Hugging Face reference",
    ),
    Family(
        name="Qwen3-VL",
        architectures=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        adapter="evs_vllm.families.qwen3_vl:Qwen3VL",
        positions="interleaved M-RoPE (t, h, w)",
        layout="per unit, between timestamps",
        reuse=True,
        grows=_UNITS_BETWEEN_TEXT,
        proof="Hugging Face reference",
    ),
    Family(
        name="Qwen3.5",
        architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        adapter="evs_vllm.families.qwen3_vl:Qwen3VL",
        positions="interleaved M-RoPE (t, h, w)",
        layout="per unit, between timestamps",
        reuse=True,
        grows=_UNITS_BETWEEN_TEXT,
        proof="Hugging Face reference",
        limits="linear attention was run in fp32 by the tests, not by a kernel of vLLM's",
    ),
    Family(
        name="GLM-4.1V",
        architectures=("Glm4vForConditionalGeneration",),
        adapter="evs_vllm.families.glm4v:GLM4V",
        positions="M-RoPE (t, h, w)",
        layout="per unit, between timestamps",
        reuse=True,
        grows=_UNITS_BETWEEN_TEXT,
        proof="Hugging Face reference",
        limits=(
            "one video per request, which is vLLM's limit; 4.6V-Flash, this model with GLM-4.6V's processor, was "
            "not run"
        ),
    ),
    Family(
        name="GLM-4.5V, 4.6V",
        architectures=("Glm4vMoeForConditionalGeneration",),
        adapter="evs_vllm.families.glm4v:GLM4V",
        positions="M-RoPE (t, h, w)",
        layout="per unit, between timestamps",
        reuse=True,
        grows=_UNITS_BETWEEN_TEXT,
        proof="Hugging Face reference",
        limits="one video per request, which is vLLM's limit",
    ),
    Family(
        name="InternVL-HF",
        architectures=("InternVLForConditionalGeneration",),
        adapter="evs_vllm.families.internvl:InternVLNative",
        positions="1-D RoPE",
        layout="text and brackets around each frame",
        reuse=True,
        proof="Hugging Face reference",
    ),
    Family(
        name="InternVL",
        architectures=("InternVLChatModel",),
        adapter="evs_vllm.families.internvl:InternVLChat",
        positions="1-D RoPE",
        layout="text and brackets around each frame",
        reuse=True,
        proof="Hugging Face reference",
        limits="video only where vLLM has it: Qwen2, Qwen3 and GPT-OSS language models",
    ),
    Family(
        name="LLaVA-OneVision",
        architectures=("LlavaOnevisionForConditionalGeneration",),
        adapter="evs_vllm.families.llava:LlavaOnevision",
        positions="1-D RoPE",
        layout="contiguous, then a newline",
        reuse=False,
        proof="Hugging Face reference",
        limits="no encoder reuse: its resizing mixes neighbouring patches",
    ),
    Family(
        name="LLaVA-NeXT-Video",
        architectures=("LlavaNextVideoForConditionalGeneration",),
        adapter="evs_vllm.families.llava:LlavaNextVideo",
        positions="1-D RoPE",
        layout="contiguous",
        reuse=True,
        proof="Hugging Face reference",
        limits="one video a prompt, no images (vLLM's)",
    ),
    Family(
        name="Qwen2.5-Omni",
        architectures=("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"),
        adapter="evs_vllm.families.omni:Qwen2_5Omni",
        positions="M-RoPE (t, h, w), t in real time",
        layout="contiguous",
        reuse=True,
        grows=_UNITS_ALONE,
        proof="Hugging Face reference",
        limits="the thinker; `use_audio_in_video` is refused for a video that is pruned",
    ),
    Family(
        name="Qwen3-Omni",
        architectures=("Qwen3OmniMoeForConditionalGeneration",),
        adapter="evs_vllm.families.omni:Qwen3Omni",
        positions="interleaved M-RoPE (t, h, w), t in real time",
        layout="contiguous",
        reuse=True,
        grows=_UNITS_ALONE,
        proof="Hugging Face reference",
        limits="the thinker; `use_audio_in_video` is refused for a video that is pruned",
    ),
    Family(
        name="Gemma 4",
        architectures=("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        adapter="evs_vllm.families.gemma4:Gemma4",
        positions="1-D RoPE",
        layout="text and brackets around each frame",
        reuse=False,
        proof="Hugging Face reference",
        limits=(
            "no encoder reuse: its tower takes whole frames only; attention within a frame in both directions "
            "(`use_bidirectional_attention`) was not run, vLLM's CPU engine has none"
        ),
    ),
    Family(
        name="Ovis2.5",
        architectures=("Ovis2_5",),
        adapter="evs_vllm.families.ovis:Ovis25",
        positions="1-D RoPE",
        layout="contiguous, between two indicators",
        reuse=False,
        proof="Hugging Face language model, tower written down in the tests",
        limits="one video a prompt (vLLM's); no encoder reuse yet",
    ),
)


WHY_NOT_CAUSAL = (
    "it is not worked out for this model family what the beginning of a clip that grows depends on (docs/families.md "
    "has those of which it is)."
)


def family_of(architecture: str) -> Family | None:
    """The row that serves `architecture`, if any."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)


def supported_architectures() -> tuple[str, ...]:
    """Every architecture of the table, in its order."""
    return tuple(arch for family in FAMILIES for arch in family.architectures)
