# SPDX-License-Identifier: Apache-2.0
"""The independent reference of the families whose processor gives whole frames and whose language model has 1-D RoPE.

As `tests/reference/hf.py`: Hugging Face's model with the same weights, pruned by plain code. The prompt is expanded as
text, tokenized, and its placeholders are filled with the tower's rows in their order; dropped ones are taken out, and
every token has one position ID: its place in the unpruned prompt, or with "sequential" clips its place without theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reference import appearance
from tests.reference.hf import Clip, Picture, Result, select
from tests.reference.tower import computed_tokens, reuses

NATIVE = "native"


class FramesReference:
    """One model folder in transformers, fp32; of InternVL's own format the copy in the format of transformers."""

    def __init__(self, directory: str | Path) -> None:
        import transformers

        directory = Path(directory)
        self.chat_format = (directory / NATIVE).is_dir()
        folder = directory / NATIVE if self.chat_format else directory
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, config.architectures[0])
        self.model = architecture.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        if self.chat_format:
            self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        self.config, self.kind = config, config.model_type
        self.lead = 0  # rows of a clip before those of its tokens
        # What stands in the prompt for an item, and what stands for each of its rows.
        internvl = self.kind == "internvl"
        self.image, self.video = ("<image>" if self.chat_format or not internvl else "<IMG_CONTEXT>"), "<video>"
        self.image_row = "<IMG_CONTEXT>" if internvl else "<image>"
        self.video_row = "<|video_pad|>" if self.chat_format else "<video>"
        self.image_id, self.video_id = self.tokenizer.convert_tokens_to_ids([self.image_row, self.video_row])

    def spelled(self, prompt: str) -> str:
        """As `tests.reference.hf.Reference.spelled`; tests write these prompts with the model's own names."""
        return prompt

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        media: Sequence[Clip | Picture] = (),
        max_tokens: int = 12,
        distort: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Result:
        """As `tests.reference.hf.Reference.generate`; positions are (1, prompt tokens)."""
        queue, text = list(media), ""
        seen: dict[int, list[torch.Tensor]] = {self.image_id: [], self.video_id: []}
        # Of each row: whether it stays, and whether its clip is sequential.
        stays: dict[int, list[tuple[bool, bool]]] = {self.image_id: [], self.video_id: []}
        kept, grids = [], []
        for piece in re.split(f"({re.escape(self.image)}|{re.escape(self.video)})", prompt):
            if piece == self.image:
                rows = self._see_image(queue.pop(0))
                seen[self.image_id].append(rows)
                stays[self.image_id] += [(True, False)] * len(rows)
                text += self._image_text(len(rows))
            elif piece == self.video:
                clip = queue.pop(0)
                rows, grid, pixels = self.see_clip(clip)
                keep = select(pixels, clip.settings)
                sequential = clip.settings.positions == "sequential" and not clip.settings.off
                tokens = grid[0] * grid[1] * grid[2]
                dropped = {self.lead + i for i in set(range(tokens)) - set(keep.tolist())}
                stays[self.video_id] += [(i not in dropped, sequential) for i in range(len(rows))]
                seen[self.video_id].append(rows)
                text += self._video_text(clip, grid[0], len(rows))
                kept.append(keep)
                grids.append(grid)
            else:
                text += piece
        assert not queue, "more media than placeholders"

        embed = self.model.get_input_embeddings()
        sources = {token: iter(_rows(parts)) for token, parts in seen.items()}
        fates = {token: iter(each) for token, each in stays.items()}
        rows, positions, prompt_ids, following = [], [], [], 0
        for token in self.tokenizer(text)["input_ids"]:
            row = next(sources[token]) if token in sources else embed(torch.tensor(token))
            stay, sequential = next(fates[token]) if token in fates else (True, False)
            if stay:
                rows.append(row)
                positions.append(following)
                prompt_ids.append(token)
            following += stay or not sequential
        assert all(next(rest, None) is None for rest in (*fates.values(), *sources.values()))
        ids = np.array([positions])
        if distort is not None:
            ids = distort(ids)
        tokens, logprobs = self._decode(torch.stack(rows), prompt_ids, ids[0], following, max_tokens)
        return Result(prompt_ids, ids, kept, grids, following, tokens, logprobs)

    def silence_attention(self) -> None:
        """Takes attention out of the tower, so that a row sees its own patches only."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "vision_tower" in name and any(part in name for part in ("out_proj", "o_proj", "projection_layer")):
                    weight.zero_()

    def _image_text(self, rows: int) -> str:
        return f"<img>{self.image_row * rows}</img>" if self.kind == "internvl" else self.image_row * rows

    def _video_text(self, clip: Clip, frames: int, rows: int) -> str:
        if self.kind != "internvl":
            return self.video_row * rows
        one = f"<img>{self.video_row * (rows // frames)}</img>"
        return ("" if self.chat_format else "\n").join(f"Frame{i + 1}: {one}" for i in range(frames))

    def _beside(self, ids: Sequence[int]) -> dict[str, Any]:
        """What the language model takes of tokens beside their embeddings."""
        return {}

    def _decode(
        self, rows: torch.Tensor, ids: Sequence[int], positions: np.ndarray, following: int, max_tokens: int
    ) -> Any:
        from transformers import DynamicCache

        cache, language_model = DynamicCache(config=self.config.get_text_config()), self.model.model.language_model
        inputs, where, tokens, logprobs = rows[None], torch.from_numpy(positions)[None], [], []
        for step in range(max_tokens):
            seen = torch.ones(1, len(rows) + step, dtype=torch.long)  # said outright: gaps in the IDs separate nothing
            out = language_model(
                inputs_embeds=inputs, position_ids=where, past_key_values=cache, use_cache=True, attention_mask=seen,
                **self._beside(ids),
            )  # fmt: skip
            logits = self.model.lm_head(out.last_hidden_state[0, -1]).float()
            logprobs.append(torch.log_softmax(logits, dim=-1).numpy())
            tokens.append(int(logprobs[-1].argmax()))
            ids = tokens[-1:]
            inputs = self.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            where = torch.tensor([[following + step]])
        return tokens, np.stack(logprobs)

    def _see_image(self, picture: Picture) -> torch.Tensor:
        core, config = self.model.model, self.config
        how = {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        if self.kind == "internvl":
            seen = self.processor.image_processor(images=[picture.pixels], return_tensors="pt", crop_to_patches=True)
            return core.get_image_features(seen["pixel_values"], **how).pooler_output.flatten(0, 1)
        seen = self.processor.image_processor(images=[picture.pixels], return_tensors="pt")
        return core.get_image_features(seen["pixel_values"], seen["image_sizes"], **how).pooler_output[0]

    @torch.inference_mode()
    def see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        """The tower's rows (R, hidden), the token grid, and the uint8 pixels (T, P, D) that are compared."""
        core, config = self.model.model, self.config
        how = {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        frames = torch.from_numpy(clip.frames if not self.chat_format else self._resized(clip.frames))
        look = self.processor.video_processor
        video = frames.permute(0, 3, 1, 2)
        normal = look(videos=[video], return_tensors="pt")["pixel_values_videos"]
        raw = look(videos=[video], return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values_videos"][0]
        assert raw.dtype == torch.uint8
        if self.kind == "internvl":
            rows = core.get_image_features(normal[0], **how).pooler_output.flatten(0, 1)
        elif self.kind == "llava_onevision":
            rows = core.get_video_features(normal, **how).pooler_output[0]
        else:
            rows = core.get_video_features(normal, **how).pooler_output[0].flatten(0, 1)
        blocks = self.blocks()
        tokens = np.array([
            [frame[:, top[0] : top[1], left[0] : left[1]].reshape(-1) for top in blocks for left in blocks]
            for frame in raw.numpy()
        ])  # fmt: skip
        kept = select(tokens, clip.settings)
        if reuses(clip.settings) and len(kept) < tokens.shape[0] * tokens.shape[1]:
            seen, tops = raw.permute(0, 2, 3, 1).numpy(), [first for first, _ in blocks]
            cells = appearance.pictures(seen, 1, tops, tops, blocks[0][1] - blocks[0][0])
            rows = self._reuse(normal[0], computed_tokens(appearance.learned(cells), kept, clip.settings))
        return rows, (len(raw), len(blocks), len(blocks)), tokens

    def _reuse(self, frames: torch.Tensor, computed: np.ndarray) -> torch.Tensor:
        """The tower's rows by the rule of K/V reuse: dense, the rows that are not computed NaN in every layer.

        Args:
            frames: (T, 3, S, S) normalised.
            computed: (T*P,) bool, which tokens are computed; the first frame is. The class token is in every frame of
                which any token is.
        """
        core, vision = self.model.model, self.model.model.vision_tower
        hidden = vision.embeddings(frames)  # (T, 1 + patches, width)
        units, places, width = hidden.shape
        side = round((places - 1) ** 0.5)
        alive = torch.zeros(units, places, dtype=torch.bool)
        for unit in range(units):
            for row in range(side):
                for column in range(side):
                    token = (unit * (side // 2) + row // 2) * (side // 2) + column // 2
                    alive[unit, 1 + row * side + column] = bool(computed[token])
            alive[unit, 0] = bool(alive[unit].any())
        assert alive[0].all(), "the first frame must be whole"
        latest = torch.zeros(units, places, dtype=torch.long)
        for unit in range(1, units):
            latest[unit] = torch.where(alive[unit], unit, latest[unit - 1])

        def poisoned(x: torch.Tensor) -> torch.Tensor:
            return torch.where(alive[:, :, None], x, torch.nan)

        hidden, everywhere = poisoned(hidden), torch.arange(places)
        clip = self.kind == "llava_next_video"
        if clip:  # reads the output of the last layer but one
            hidden, layers = vision.pre_layrnorm(hidden), vision.encoder.layers[:-1]
        else:
            layers = vision.encoder.layer
        for layer in layers:
            attention = layer.self_attn if clip else layer.attention
            x = (layer.layer_norm1 if clip else layer.layernorm_before)(hidden)
            heads = (units, places, attention.num_heads, attention.head_dim)
            query, key, value = (
                project(x).view(heads) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            seen = []
            for unit in range(units):
                k, v = key[latest[unit], everywhere], value[latest[unit], everywhere]
                weights = torch.softmax(torch.einsum("qhd,khd->hqk", query[unit], k) * attention.scale, dim=-1)
                seen.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            if clip:
                hidden = hidden + attention.out_proj(torch.stack(seen))
                hidden = poisoned(hidden + layer.mlp(layer.layer_norm2(hidden)))
            else:
                hidden = hidden + layer.lambda_1 * attention.projection_layer(torch.stack(seen))
                hidden = poisoned(hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden)))
        if clip:
            assert self.config.vision_feature_layer == -2 and self.config.spatial_pool_mode == "average"
            pooled = hidden[:, 1:].reshape(units, side // 2, 2, side // 2, 2, width).mean(dim=(2, 4))
            return core.multi_modal_projector(pooled.flatten(0, 2))
        patches = vision.layernorm(hidden)[:, 1:].reshape(units, side, side, width)
        return core.multi_modal_projector(core.pixel_shuffle(patches).flatten(1, 2)).flatten(0, 1)

    def _resized(self, frames: np.ndarray) -> np.ndarray:
        """InternVL's own format resizes with Pillow."""
        from PIL import Image

        side = self.config.vision_config.image_size[0]
        return np.stack([np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames])

    def blocks(self) -> list[tuple[int, int]]:
        """Along one side of a frame, the pixels (from, to) that the rows of the tower's output come from."""
        vision = self.config.vision_config
        patch, size = (x if isinstance(x, int) else x[0] for x in (vision.patch_size, vision.image_size))
        count = size // patch
        if self.kind != "llava_onevision":
            return [(i * patch, (i + 2) * patch) for i in range(0, count, 2)]
        # Bilinear resizing: the value at i is read between the two patches whose centres surround its own.
        scale, out = Fraction(count, (count + 1) // 2), []
        for i in range((count + 1) // 2):
            centre = (i + Fraction(1, 2)) * scale - Fraction(1, 2)
            out.append((int(centre) * patch, (int(centre) + 2) * patch))
        return out


def _rows(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [row for part in parts for row in part]
