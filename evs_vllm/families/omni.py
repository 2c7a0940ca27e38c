# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-Omni and Qwen3-Omni, the thinkers.

Pixel rows are Qwen2-VL's and the clip is one run of placeholders; the towers are those of Qwen2.5-VL and Qwen3-VL. Time
counts in seconds, with as many position IDs each as the config says. Audio items of their own stand in the prompt as
text does. ``use_audio_in_video`` is refused: it puts audio tokens between those of the clip, and the model numbers both
together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families.base import ReuseTower
from evs_vllm.families.qwen2_vl import Qwen2VL, Qwen2VLTower

AUDIO_IN_VIDEO = "use_audio_in_video"


class Qwen2_5Omni(Qwen2VL):
    """Adapter of the Qwen2.5-Omni thinker."""

    @staticmethod
    def media_config(hf_config: Any) -> Any:
        return getattr(hf_config, "thinker_config", hf_config)

    def unsupported_kwargs(self, mm_processor_kwargs: Mapping[str, Any]) -> str:
        if not mm_processor_kwargs.get(AUDIO_IN_VIDEO):
            return super().unsupported_kwargs(mm_processor_kwargs)
        return f"{AUDIO_IN_VIDEO} puts audio tokens between those of the clip"

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        per_clip = {key: value for key, value in batch.items() if key != AUDIO_IN_VIDEO}
        return super().select_clips(per_clip, plans, start, stop)

    def ids_per_unit(self, item: Mapping[str, Any]) -> float:
        seconds = item.get("second_per_grid_ts")
        return self._ids_per_second() * (self._seconds if seconds is None else float(seconds))

    _seconds = 1.0  # per unit where the processor does not say

    def _ids_per_second(self) -> float:
        return float(getattr(self.config.vision_config, "tokens_per_second", 25))


class Qwen3Omni(Qwen2_5Omni):
    """Adapter of the Qwen3-Omni thinker; deepstack features are further columns of the embedding rows."""

    _seconds = 2.0

    def _ids_per_second(self) -> float:
        return float(self.config.position_id_per_seconds)

    def reuse_tower(self, model: Any) -> ReuseTower:
        return Qwen3OmniTower(model.visual)


class Qwen3OmniTower(Qwen2VLTower):
    """Qwen3-VL's tower with a forward of its own that takes whole clips only, so its parts run here in their order."""

    def _per_slot(self, height: int, width: int) -> dict[str, torch.Tensor]:
        visual = self._visual
        cos, sin = visual.rot_pos_emb(torch.tensor([[1, height, width]]))
        values = {"rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin}
        if visual.apply_vit_abs_pos_embed:
            values["pos_embeds"] = visual.fast_pos_embed_interpolate([[1, height, width]])
        return {name: self._by_token(rows) for name, rows in values.items()}

    def _run(self, pixels: torch.Tensor, metadata: dict[str, Any]) -> torch.Tensor:
        visual = self._visual
        hidden = visual.patch_embed(pixels.to(device=visual.device, dtype=visual.dtype))
        if visual.apply_vit_abs_pos_embed:
            hidden = hidden + metadata["pos_embeds"]
        hidden = hidden[:, None]
        deep: list[torch.Tensor] = []
        for number, block in enumerate(visual.blocks):
            hidden = block(
                hidden,
                cu_seqlens=metadata["cu_seqlens"],
                rotary_pos_emb_cos=metadata["rotary_pos_emb_cos"],
                rotary_pos_emb_sin=metadata["rotary_pos_emb_sin"],
                max_seqlen=None,
                sequence_lengths=None,
            )
            if number in (visual.deepstack_visual_indexes or ()):
                deep.append(visual.merger_list[len(deep)](hidden))
        return torch.cat([visual.merger(hidden), *deep], dim=1)
