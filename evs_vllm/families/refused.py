# SPDX-License-Identifier: Apache-2.0
"""Video models of vLLM that EVS refuses at start-up, and why: one table, read by the plugin, the CLI and the docs.

The reasons come from reading vLLM 0.32's sources. This module imports neither torch nor vLLM.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
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
        name="MiniCPM-V to 4.5, MiniCPM-o",
        architectures=("MiniCPMV", "MiniCPMO"),
        reason="a resampler turns every slice into 64 learned queries, so no patch of pixels belongs to one token",
        fits=False,
    ),
    Refused(
        name="Kimi-K2.5",
        architectures=("KimiK25ForConditionalGeneration",),
        reason=(
            "every 4 frames are a multimodal item with a cache entry of its own, so a clip cannot be compared "
            "across them"
        ),
        fits=False,
    ),
    Refused(
        name="vLLM's Transformers backend",
        architectures=("TransformersMultiModalForCausalLM", "TransformersMultiModalMoEForCausalLM"),
        reason="where a clip's pixels and tokens are depends on the model behind it",
        fits=False,
    ),
    Refused(
        name="Keye-VL 1.5",
        architectures=("KeyeVL1_5ForConditionalGeneration",),
        reason=("slow and fast frames have different sizes, and a plan has one grid of tokens for all units of a clip"),
        fits=False,
    ),
    Refused(
        name="MiniCPM-V 4.6, 4.7",
        architectures=("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration"),
        reason=(
            "a frame becomes an overview and slices, which are not one grid of rows and columns; 4.6 also writes "
            "a cached clip's prompt anew from its text where the clip's number differs, and the plan that lies "
            "with it is lost"
        ),
        fits=True,
    ),
    Refused(
        name="Nemotron Nano VL",
        architectures=(
            (
                "NemotronH_Nano_VL_V2",
                "NemotronH_Nano_Omni_Reasoning_V3",
                "NemotronH_Super_Omni_Reasoning_V3",
                "NemotronH_Omni_Reasoning_V3",
            )
        ),
        reason=(
            "the text between frames is part of the rows that the encoder returns; an adapter could say so, but "
            "its tower, its tubelets of several frames and its Mamba layers have not been run"
        ),
        fits=True,
    ),
    Refused(
        name="Keye-VL, Molmo2",
        architectures=("KeyeForConditionalGeneration", "Molmo2ForConditionalGeneration"),
        reason=(
            "the checkpoints' own code makes their pixel rows; neither vLLM nor transformers has it, so it has "
            "not been verified which pixels belong to which token"
        ),
        fits=True,
    ),
    Refused(
        name="Ovis2.6",
        architectures=("Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM"),
        reason="it runs with vLLM's code for Ovis2.5, which EVS supports, but has not been run",
        fits=True,
    ),
    Refused(
        name="Ernie-4.5-VL",
        architectures=("Ernie4_5_VLMoeForConditionalGeneration",),
        reason=(
            "vLLM 0.32 takes the config and the pixel rows of the checkpoints' own code only, other fields than "
            "those of transformers, so it has not been verified which pixels of its two frames belong to which "
            "token"
        ),
        fits=True,
    ),
)


def refusal_of(architecture: str) -> Refused | None:
    """The row that names `architecture`, if any."""
    return next((row for row in REFUSED if architecture in row.architectures), None)
