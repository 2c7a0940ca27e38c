# SPDX-License-Identifier: Apache-2.0
"""The independent reference: the same weights in Hugging Face transformers, pruned by code written from the paper.

Nothing here comes from `evs_vllm` or `evs_kernels`, and nothing is fast. A prompt is text with one
`<|image_pad|>` / `<|video_pad|>` per item. The whole clip goes through the vision tower, a plain NumPy selection picks
the tokens to keep, their embeddings are gathered, every token gets an explicit M-RoPE position ID, and the language
model decodes greedily, one step at a time.

Positions are vLLM's: text after a clip resumes at max over (t, h, w) + 1. transformers' own `get_rope_index` resumes at
max(h, w), so it is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Settings:
    """What to drop from a clip. The default drops nothing."""

    rate: float = 0.0
    threshold: float | None = None
    positions: str = "keep"
    min_tokens_per_unit: int = 0
    max_tokens: int | None = None

    @property
    def off(self) -> bool:
        return not self.rate and not self.threshold and self.max_tokens is None


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: uint8 frames (F, H, W, 3). `fps` is that of the frames given."""

    frames: np.ndarray
    fps: float = 2.0
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image: uint8 (H, W, 3)."""

    pixels: np.ndarray


@dataclass
class Result:
    """What the reference says about one request."""

    prompt_ids: list[int]
    positions: np.ndarray
    """int64 (3, prompt tokens): the (t, h, w) position ID of every prompt token."""
    kept: list[np.ndarray]
    """Per clip, the sorted flat indices of the kept tokens."""
    grids: list[tuple[int, int, int]]
    """Per clip, (units, rows, columns) in tokens."""
    following: int
    """The position ID of the first generated token."""
    tokens: list[int]
    logprobs: np.ndarray
    """fp32 (generated tokens, vocabulary)."""

    @property
    def gap(self) -> float:
        """The smallest distance between the best and the second-best logprob of any step."""
        top2 = np.sort(self.logprobs, axis=1)[:, -2:]
        return float((top2[:, 1] - top2[:, 0]).min())


def select(pixels: np.ndarray, settings: Settings) -> np.ndarray:
    """Which tokens of a clip to keep.

    Args:
        pixels: uint8 (units T, tokens per unit P, bytes D): all pixels of each token.
        settings: the budget.

    Returns:
        Sorted flat indices. Unit 0 whole, then the tokens that changed most against the same place one unit earlier.
    """
    units, per_unit, size = pixels.shape
    if settings.off:
        return np.arange(units * per_unit)
    score = {}
    for t in range(1, units):
        for p in range(per_unit):
            now, before = pixels[t, p].astype(np.int64), pixels[t - 1, p].astype(np.int64)
            score[t * per_unit + p] = int(np.abs(now - before).sum())
    keep = set(range(per_unit))
    for t in range(1, units):
        unit = sorted(range(t * per_unit, (t + 1) * per_unit), key=lambda i: (-score[i], i))
        keep.update(unit[: settings.min_tokens_per_unit])
    ranked = sorted((i for i in score if i not in keep), key=lambda i: (-score[i], i))
    if settings.threshold is not None:
        tau = Fraction(str(settings.threshold)) * size
        ranked = [i for i in ranked if score[i] >= tau]
        budget = len(keep) + len(ranked)
    else:
        budget = int(units * per_unit * (1 - Fraction(str(settings.rate))))
    if settings.max_tokens is not None:
        budget = min(budget, settings.max_tokens)
    keep.update(ranked[: max(0, budget - len(keep))])
    return np.array(sorted(keep))


def number_clip(grid: tuple[int, int, int], time_step: float, kept: np.ndarray, sequential: bool) -> tuple[Any, int]:
    """Position IDs of a clip's kept tokens, counted from its first token, and how far the text after it moves on."""
    if sequential:
        return np.tile(np.arange(len(kept)), (3, 1)), len(kept)
    units, rows, columns = grid
    ids = [(int(t * time_step), r, c) for t in range(units) for r in range(rows) for c in range(columns)]
    return np.array([ids[i] for i in kept], dtype=np.int64).T, max(max(triple) for triple in ids) + 1


class Reference:
    """One model folder in transformers, fp32."""

    def __init__(self, directory: str | Path) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory)
        architecture = getattr(transformers, config.architectures[0])
        self.model = architecture.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.processor = transformers.AutoProcessor.from_pretrained(directory)
        self.tokenizer = self.processor.tokenizer
        self.config = config
        self.image_id, self.video_id = config.image_token_id, config.video_token_id

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | list[int],
        media: Sequence[Clip | Picture] = (),
        max_tokens: int = 12,
        distort: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Result:
        """Greedy decoding of exactly `max_tokens` tokens (the models never generate an end token).

        `distort` changes the position IDs of the prompt: what a wrong implementation would answer.
        """
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        embed = self.model.get_input_embeddings()
        rows, positions, prompt_ids, kept, grids = [], [], [], [], []
        following, queue = 0, list(media)
        for token in ids:
            if token == self.image_id:
                vectors, grid = self._see_image(queue.pop(0))
                here, step = number_clip(grid, 1.0, np.arange(len(vectors)), sequential=False)
            elif token == self.video_id:
                clip = queue.pop(0)
                vectors, grid, pixels = self._see_clip(clip)
                keep = select(pixels, clip.settings)
                sequential = clip.settings.positions == "sequential" and not clip.settings.off
                here, step = number_clip(grid, self._time_step(clip), keep, sequential)
                vectors = vectors[torch.from_numpy(keep)]
                kept.append(keep)
                grids.append(grid)
            else:
                vectors, here, step = embed(torch.tensor([token])), np.zeros((3, 1), dtype=np.int64), 1
            rows.append(vectors)
            positions.append(here + following)
            prompt_ids += [token] * len(vectors)
            following += step
        assert not queue, "more media than placeholders"
        all_positions = np.concatenate(positions, axis=1)
        if distort is not None:
            all_positions = distort(all_positions)
        tokens, logprobs = self._decode(torch.cat(rows), all_positions, following, max_tokens)
        return Result(prompt_ids, all_positions, kept, grids, following, tokens, logprobs)

    @torch.inference_mode()
    def embeddings(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        """The full embeddings of clips, as vLLM takes them precomputed."""
        seen = [self._see_clip(clip) for clip in clips]
        fields = {
            "video_embeds": torch.cat([vectors for vectors, *_ in seen]).clone(),
            "video_grid_thw": torch.tensor([[t, 2 * h, 2 * w] for _, (t, h, w), _ in seen]),
        }
        if hasattr(self.config.vision_config, "tokens_per_second"):
            fields["second_per_grid_ts"] = torch.tensor(
                [self.config.vision_config.temporal_patch_size / c.fps for c in clips]
            )
        return fields

    def _decode(self, rows: torch.Tensor, positions: np.ndarray, following: int, max_tokens: int) -> Any:
        from transformers import DynamicCache

        cache, language_model = DynamicCache(config=self.config.get_text_config()), self.model.model.language_model
        inputs, where, tokens, logprobs = rows[None], torch.from_numpy(positions)[:, None], [], []
        for step in range(max_tokens):
            out = language_model(inputs_embeds=inputs, position_ids=where, past_key_values=cache, use_cache=True)
            logits = self.model.lm_head(out.last_hidden_state[0, -1]).float()
            logprobs.append(torch.log_softmax(logits, dim=-1).numpy())
            tokens.append(int(logprobs[-1].argmax()))
            inputs = self.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            where = torch.full((3, 1, 1), following + step)
        return tokens, np.stack(logprobs)

    def _see_image(self, picture: Picture) -> tuple[torch.Tensor, tuple[int, int, int]]:
        seen = self.processor.image_processor(images=[picture.pixels], return_tensors="pt")
        _, h, w = seen["image_grid_thw"][0].tolist()
        vectors = self.model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        return vectors, (1, h // 2, w // 2)

    def _see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        """Full embeddings (N, hidden), the token grid, and the uint8 pixels (T, P, D) that are compared."""
        look = self.processor.video_processor
        video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        seen = look(videos=[video], return_tensors="pt")
        raw = look(videos=[video], return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values_videos"]
        assert raw.dtype == torch.uint8
        t, h, w = seen["video_grid_thw"][0].tolist()
        vectors = self.model.model.visual(seen["pixel_values_videos"], grid_thw=seen["video_grid_thw"]).pooler_output
        return vectors, (t, h // 2, w // 2), raw.numpy().reshape(t, (h // 2) * (w // 2), -1)

    def _time_step(self, clip: Clip) -> float:
        """Position IDs per temporal unit: Qwen2.5-VL counts seconds (in fp32, like vLLM), Qwen2-VL units."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", None)
        if per_second is None:
            return 1.0
        return float(np.float32(self.config.vision_config.temporal_patch_size / clip.fps)) * per_second
