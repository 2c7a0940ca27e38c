# SPDX-License-Identifier: Apache-2.0
"""The independent reference of Gemma 4; see `tests/reference/frames.py` and `tests/reference/hf.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reference.frames import FramesReference
from tests.reference.hf import Clip, Picture


class Gemma4Reference(FramesReference):
    """Its own video processor, where vLLM uses the one for images; the pixels of a token are read off their places."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.unified = self.kind == "gemma4_unified"  # without a tower: a row of pixels is a token
        self.image = self.image_row = "<|image|>"
        self.video = self.video_row = "<|video|>"
        self.image_id, self.video_id = self.tokenizer.convert_tokens_to_ids([self.image, self.video])

    def _image_text(self, rows: int) -> str:
        return f"<|image>{self.image * rows}<image|>"

    def _video_text(self, clip: Clip, frames: int, rows: int) -> str:
        seconds = [int(frame / clip.fps) for frame in range(frames)]
        one = f"<|image>{self.video * (rows // frames)}<image|>"
        return " ".join(f"{second // 60:02d}:{second % 60:02d} {one}" for second in seconds)

    def _beside(self, ids: Sequence[int]) -> dict[str, Any]:
        core = self.model.model.language_model
        if self.unified:
            return {}
        pad = self.config.text_config.pad_token_id
        text = [pad if token in (self.image_id, self.video_id) else token for token in ids]
        return {"per_layer_inputs": core.get_per_layer_inputs(torch.tensor([text]), None)}

    def _see_image(self, picture: Picture) -> torch.Tensor:
        seen = self.processor.image_processor(images=[picture.pixels], return_tensors="pt")
        out = self.model.model.get_image_features(seen["pixel_values"], seen["image_position_ids"], return_dict=True)
        return out.pooler_output[0]

    @torch.inference_mode()
    def see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        look = self.processor.video_processor
        seen = look(videos=[video], return_tensors="pt", do_sample_frames=False)
        raw = look(videos=[video], return_tensors="pt", do_sample_frames=False, do_normalize=False, do_rescale=False)
        pixels, places = raw["pixel_values_videos"], raw["video_position_ids"]
        assert pixels.dtype == torch.uint8
        count = torch.tensor([len(clip.frames)])
        out = self.model.model.get_video_features(
            seen["pixel_values_videos"], seen["video_position_ids"], count, return_dict=True
        )
        units, pool = [], 1 if self.unified else 3
        for patches, where in zip(pixels.numpy(), places.tolist(), strict=True):
            tokens: dict[tuple[int, int], list[np.ndarray]] = {}
            for patch, (x, y) in zip(patches, where, strict=True):
                if x >= 0:
                    tokens.setdefault((y // pool, x // pool), []).append(patch)
            units.append([np.concatenate(tokens[place]) for place in sorted(tokens)])
            rows, columns = (1 + max(place[axis] for place in tokens) for axis in (0, 1))
        return out.pooler_output[0], (len(units), rows, columns), np.array(units)
