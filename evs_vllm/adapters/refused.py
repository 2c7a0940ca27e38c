# SPDX-License-Identifier: Apache-2.0
"""Video models of vLLM that EVS refuses at start-up, and why: one table, read by the plugin, the CLI and the README.

The reasons come from reading vLLM 0.32's sources. This module imports neither torch nor vLLM.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """One row of the table.

    Attributes:
        name: Short name.
        architectures: Values of ``architectures`` in config.json.
        reason: Why, as the rest of a sentence.
        fits: Whether an adapter could change that ("not yet"), or the mechanism itself does not fit.
    """

    name: str
    architectures: tuple[str, ...]
    reason: str
    fits: bool


REFUSED: tuple[Refused, ...] = (
    Refused(
        "MiniCPM-V to 4.5, MiniCPM-o",
        ("MiniCPMV", "MiniCPMO"),
        "a resampler turns every slice into 64 learned queries, so no patch of pixels belongs to one token",
        False,
    ),
    Refused(
        "Kimi-K2.5",
        ("KimiK25ForConditionalGeneration",),
        "every 4 frames are a multimodal item with a cache entry of its own, so a clip cannot be compared across them",
        False,
    ),
    Refused(
        "vLLM's Transformers backend",
        ("TransformersMultiModalForCausalLM", "TransformersMultiModalMoEForCausalLM"),
        "where a clip's pixels and tokens are depends on the model behind it",
        False,
    ),
    Refused(
        "Qwen2.5-Omni, Qwen3-Omni",
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
        "with use_audio_in_video, audio tokens lie between those of the clip",
        True,
    ),
    Refused(
        "MiniCPM-V 4.6, 4.7",
        ("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration"),
        "frames are cut into slices of different sizes, and 4.6 rewrites cached prompts",
        True,
    ),
    Refused(
        "Gemma 4",
        ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "patches are pooled by position IDs, and attention within a frame's tokens is bidirectional",
        True,
    ),
    Refused(
        "Nemotron Nano VL",
        (
            "NemotronH_Nano_VL_V2",
            "NemotronH_Nano_Omni_Reasoning_V3",
            "NemotronH_Super_Omni_Reasoning_V3",
            "NemotronH_Omni_Reasoning_V3",
        ),
        "the rows that the encoder returns contain the text between the frames",
        True,
    ),
    Refused(
        "Ovis2.5, 2.6",
        ("Ovis2_5", "Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM"),
        "indicator rows around the clip have not been mapped",
        True,
    ),
    Refused(
        "Keye-VL",
        ("KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"),
        "its rows are in raster order, and 1.5 gives some frames another resolution",
        True,
    ),
    Refused(
        "Molmo2",
        ("Molmo2ForConditionalGeneration",),
        "tokens are pooled through an index of patches, between rows of special tokens",
        True,
    ),
    Refused(
        "Ernie-4.5-VL",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
        "a token joins two frames after the encoder, and clips have the placeholder of images",
        True,
    ),
)


def refusal_of(architecture: str) -> Refused | None:
    """The row that names `architecture`, if any."""
    return next((row for row in REFUSED if architecture in row.architectures), None)
