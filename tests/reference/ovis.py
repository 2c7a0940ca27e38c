# SPDX-License-Identifier: Apache-2.0
"""The independent reference of Ovis2.5; see `tests/reference/frames.py` and `tests/reference/hf.py`.

transformers has its language model and its image processor. The tower is written here, one frame at a time: attention
over the whole frame, rotary phases of (row, column), then each 2 x 2 patches become weights of the words of a visual
vocabulary. Windows are not written down: released models have none.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

from tests.families.ovis import INDICATORS, LANGUAGE
from tests.reference.frames import FramesReference
from tests.reference.hf import Clip, Picture

SIDE = 448


class OvisReference(FramesReference):
    """One model folder."""

    def __init__(self, directory: str | Path) -> None:
        import transformers
        from safetensors.torch import load_file

        directory = Path(directory)
        language = transformers.Qwen3ForCausalLM.from_pretrained(
            directory / LANGUAGE, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model: Any = SimpleNamespace(
            get_input_embeddings=language.get_input_embeddings,
            lm_head=language.lm_head,
            model=SimpleNamespace(language_model=language.model),
        )
        self.weights = load_file(directory / "model.safetensors")
        self.config: Any = language.config
        self.chat_format, self.kind, self.lead = False, "ovis2_5", 1
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        self.processor: Any = SimpleNamespace(
            image_processor=transformers.SiglipImageProcessor.from_pretrained(directory)
        )
        self.image, self.video = "<image>", "<video>"
        self.image_row = self.video_row = "<|image_pad|>"
        self.image_id = self.video_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def silence_attention(self) -> None:
        for name, weight in self.weights.items():
            if "out_proj" in name:
                weight.zero_()

    def _see_image(self, picture: Picture) -> torch.Tensor:
        return self._with_indicators(self._tower(self._looked(picture.pixels)), "image")

    @torch.inference_mode()
    def see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        rows, units = [], []
        for frame in clip.frames:
            rows.append(self._tower(self._looked(frame)))
            raw = self._looked(frame, do_rescale=False, do_normalize=False).numpy()
            assert (raw == raw.astype(np.uint8)).all()
            units.append([
                raw[:, top : top + 112, left : left + 112].astype(np.uint8).reshape(-1)
                for top in range(0, raw.shape[1], 112) for left in range(0, raw.shape[2], 112)
            ])  # fmt: skip
        grid = (len(units), raw.shape[1] // 112, raw.shape[2] // 112)
        return self._with_indicators(torch.cat(rows), "video"), grid, np.array(units)

    def _looked(self, pixels: np.ndarray, **how: bool) -> torch.Tensor:
        """(3, height, width) after the image processor; both sides multiples of 112 with at least 448 x 448 pixels."""
        height, width = pixels.shape[:2]
        grow = max(1.0, (SIDE * SIDE / (height * width)) ** 0.5)
        size = {"height": int(np.ceil(height * grow / 112)) * 112, "width": int(np.ceil(width * grow / 112)) * 112}
        return self.processor.image_processor(pixels, size=size, return_tensors="pt", **how)["pixel_values"][0]

    def _with_indicators(self, rows: torch.Tensor, kind: str) -> torch.Tensor:
        words = self.weights["vte.weight"]
        first, last = (words[INDICATORS[f"<ovis_{kind}_{end}>"] - 151676] for end in ("start", "end"))
        return torch.cat([first[None], rows, last[None]])

    def _tower(self, frame: torch.Tensor) -> torch.Tensor:
        """(3, height, width) normalised to (tokens, hidden)."""
        w = {name.removeprefix("visual_tokenizer.vit.vision_model."): x for name, x in self.weights.items()}
        patches = conv2d(
            frame[None], w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"], stride=56
        )
        table = w["embeddings.position_embedding.weight"]
        side = round(len(table) ** 0.5)
        rows, columns = patches.shape[2:]
        places = interpolate(
            table.T.reshape(1, -1, side, side), size=(rows, columns), mode="bicubic", align_corners=False
        )
        hidden = (patches + places)[0].flatten(1).T  # raster order
        width = hidden.shape[1]
        heads, size = width // 32, 32

        theta = 10000.0 ** -(torch.arange(0, size // 2, 2).float() / (size // 2))
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        phase = torch.cat([row[:, None] * theta, column[:, None] * theta], dim=1)
        cos, sin = phase.cos()[:, None], phase.sin()[:, None]

        def turned(x: torch.Tensor) -> torch.Tensor:
            one, other = x.chunk(2, dim=-1)
            return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)

        def dense(x: torch.Tensor, name: str) -> torch.Tensor:
            return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

        def normed(x: torch.Tensor, name: str, epsilon: float = 1e-6) -> torch.Tensor:
            return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)

        layer = 0
        while f"encoder.layers.{layer}.mlp.fc1.weight" in w:
            here = f"encoder.layers.{layer}"
            x = normed(hidden, f"{here}.layer_norm1")
            q, k, v = (dense(x, f"{here}.self_attn.{part}_proj").view(-1, heads, size) for part in "qkv")
            q, k, v = (part.transpose(0, 1) for part in (turned(q), turned(k), v))
            seen = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            hidden = hidden + dense(seen, f"{here}.self_attn.out_proj")
            x = gelu(dense(normed(hidden, f"{here}.layer_norm2"), f"{here}.mlp.fc1"), approximate="tanh")
            hidden = hidden + dense(x, f"{here}.mlp.fc2")
            layer += 1
        tokens = hidden.view(rows // 2, 2, columns // 2, 2, width).transpose(1, 2).reshape(-1, 4 * width)
        logits = normed(dense(tokens, "visual_tokenizer.head.0"), "visual_tokenizer.head.1", 1e-5)
        return logits.softmax(dim=-1) @ w["vte.weight"][: logits.shape[-1]]
