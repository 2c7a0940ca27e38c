# SPDX-License-Identifier: Apache-2.0
"""The independent reference: the same weights in Hugging Face transformers, pruned by code written from the paper.

Nothing here comes from `evs_vllm` or `evs_kernels`, and nothing is fast. A prompt is text with one
`<|image_pad|>` / `<|video_pad|>` / `<|audio_pad|>` per item. The whole clip goes through the vision tower, a plain
NumPy selection picks the tokens to keep, their embeddings are gathered, every token gets an explicit M-RoPE position
ID, and the language model decodes greedily, one step at a time.

Qwen3-VL and Qwen3.5 write each unit as ``<t seconds><vision_start>tokens<vision_end>``, GLM writes its own names
of these and the time after it; that text is spelled out here.
Embeddings of models with deepstack are wider: the columns beyond the hidden size are added after the first layers.

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

from tests.reference import appearance, selection


@dataclass(frozen=True)
class Settings:
    """What to drop from a clip, by the paper's rule unless told otherwise. The default drops nothing."""

    rate: float = 0.0
    threshold: float | None = None
    positions: str = "keep"
    min_tokens_per_unit: int = 0
    max_tokens: int | None = None
    selection: str = "paper"
    budget: str = "clip"

    @property
    def off(self) -> bool:
        return not self.rate and not self.threshold and self.max_tokens is None


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: uint8 frames (F, H, W, 3). `fps` is that of the frames given.

    `after` are the clips before it, if it is part of a stream; all have its settings.
    """

    frames: np.ndarray
    fps: float = 2.0
    settings: Settings = field(default_factory=Settings)
    after: tuple[Clip, ...] | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """An image: uint8 (H, W, 3)."""

    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Sound:
    """Audio: float32 samples at 16 kHz."""

    samples: np.ndarray


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
    if settings.budget == "causal":
        return selection.purse_of_changes(pixels, settings)
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


def number_units(grid: tuple[int, int, int], texts: Sequence[int], kept: np.ndarray, sequential: bool) -> Any:
    """The same for a clip whose unit t follows `texts[t]` tokens of text; the last of `texts` follow the last unit.

    Returns:
        (3, all tokens) IDs with the texts', counted from the first text, and how far the text after the clip moves on.
    """
    units, rows, columns = grid
    ids, following = [], 0
    for t in range(units):
        ids += [(following + i,) * 3 for i in range(texts[t])]
        following += texts[t]
        inside = [i % (rows * columns) for i in kept if i // (rows * columns) == t]
        if sequential:
            ids += [(following + i,) * 3 for i in range(len(inside))]
            following += len(inside)
        else:
            ids += [(following, following + i // columns, following + i % columns) for i in inside]
            following += max(rows, columns)
    ids += [(following + i,) * 3 for i in range(texts[units])]
    following += texts[units]
    return np.array(ids, dtype=np.int64).T, following


class Reference:
    """One model folder in transformers, fp32."""

    def __init__(self, directory: str | Path) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory)
        name = config.architectures[0]
        if thinker := hasattr(config, "thinker_config"):  # of the Omni models the part that sees and answers
            config = config.thinker_config
            name = type(config).__name__.replace("Config", "ForConditionalGeneration")
        architecture = getattr(transformers, name)
        self.model = architecture.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
        # Those of the Omni models have no level between.
        inner = self.model if thinker else self.model.model
        self.visual, self.language_model = inner.visual, inner.model if thinker else inner.language_model
        self.processor = transformers.AutoProcessor.from_pretrained(directory)
        self.tokenizer = self.processor.tokenizer
        self.config = config
        self.image_id, self.video_id = config.image_token_id, config.video_token_id
        self.audio_id = getattr(config, "audio_token_id", None)
        self.glm = architecture.__name__.startswith("Glm")
        self.clip_id = self.image_id if self.glm else self.video_id  # of a clip's tokens in the final prompt
        self.per_unit = self.glm or architecture.__name__.startswith(("Qwen3VL", "Qwen3_5"))
        self.hidden = config.get_text_config().hidden_size

    def spelled(self, prompt: Any) -> Any:
        """A prompt written with Qwen's names of the placeholders, with those of this model."""
        if self.glm and isinstance(prompt, str):
            for kind, pad in (("image", "<|image_pad|>"), ("video", "<|video_pad|>")):
                ours = f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>"
                prompt = prompt.replace(f"<|vision_start|>{pad}<|vision_end|>", ours)
        return prompt

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | list[int],
        media: Sequence[Clip | Picture | Sound] = (),
        max_tokens: int = 12,
        distort: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Result:
        """Greedy decoding of exactly `max_tokens` tokens (the models never generate an end token).

        `distort` changes the position IDs of the prompt: what a wrong implementation would answer.
        """
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        rows, positions, prompt_ids, kept, grids = [], [], [], [], []
        following, queue = 0, list(media)
        if self.glm:  # writes the tokens around a clip's place itself
            around = {self.config.video_start_token_id, self.config.video_end_token_id}
            ids = [token for token in ids if token not in around]
        for token in ids:
            if token == self.image_id:
                vectors, grid = self._see_image(queue.pop(0))
                here, step = number_clip(grid, 1.0, np.arange(len(vectors)), sequential=False)
                tokens_here = [token] * len(vectors)
            elif token == self.audio_id:
                vectors, step = self._hear(queue.pop(0))
                here, tokens_here = np.tile(np.arange(step), (3, 1)), [token] * step
            elif token == self.video_id:
                clip = queue.pop(0)
                vectors, grid, pixels = self._see_clip(clip)
                keep = self.choose(clip, grid, pixels)
                sequential = clip.settings.positions == "sequential" and not clip.settings.off
                vectors = vectors[torch.from_numpy(keep)]
                if self.per_unit:
                    texts = self._texts(clip, grid[0])
                    here, step = number_units(grid, [len(text) for text in texts], keep, sequential)
                    tokens_here, vectors = self._between_texts(texts, keep // (grid[1] * grid[2]), vectors)
                else:
                    here, step = number_clip(grid, self._time_step(clip), keep, sequential)
                    tokens_here = [token] * len(vectors)
                kept.append(keep)
                grids.append(grid)
            else:
                vectors, here, step, tokens_here = self._embed([token]), np.zeros((3, 1), dtype=np.int64), 1, [token]
            rows.append(vectors)
            positions.append(here + following)
            prompt_ids += tokens_here
            following += step
        assert not queue, "more media than placeholders"
        all_positions = np.concatenate(positions, axis=1)
        if distort is not None:
            all_positions = distort(all_positions)
        width = max(vectors.shape[1] for vectors in rows)
        rows = [torch.nn.functional.pad(vectors, (0, width - vectors.shape[1])) for vectors in rows]
        tokens, logprobs = self._decode(torch.cat(rows), all_positions, following, max_tokens)
        return Result(prompt_ids, all_positions, kept, grids, following, tokens, logprobs)

    def choose(self, clip: Clip, grid: tuple[int, int, int], pixels: np.ndarray) -> np.ndarray:
        """Which tokens of a clip to keep, by the selection that its settings name."""
        if clip.after is not None:
            looks = appearance.DESCRIBE[clip.settings.selection]
            stream = [(g[1:], looks(self.pictures(c, g))) for c in (*clip.after, clip) for g in [self.grid(c)]]
            return np.array(selection.stream(stream, clip.settings)[-1][0])
        if clip.settings.off or clip.settings.selection == "paper":
            return select(pixels, clip.settings)
        return selection.select(self.pictures(clip, grid), clip.settings)

    def grid(self, clip: Clip) -> tuple[int, int, int]:
        """(units, rows, columns) in tokens."""
        units, rows, columns = self._process(clip)["video_grid_thw"][0].tolist()
        return units, rows // 2, columns // 2

    def pictures(self, clip: Clip, grid: tuple[int, int, int]) -> np.ndarray:
        """Low-resolution pictures of a clip's tokens, from its frames as they were before they were resized."""
        return appearance.source_pictures(clip.frames, 2, *grid[1:])

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
        if self.per_unit:
            fields["timestamps"] = [self._seconds(clip, grid[0]) for clip, (_, grid, _) in zip(clips, seen)]
        return fields

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids))

    @staticmethod
    def _seconds(clip: Clip, units: int) -> list[float]:
        """When each unit of two frames is: half-way between them. The last frame of an odd count stands twice."""
        last = len(clip.frames) - 1
        return [(2 * t + min(2 * t + 1, last)) / 2 / clip.fps for t in range(units)]

    def _texts(self, clip: Clip, units: int) -> list[list[int]]:
        """The text before each unit, and after the last."""

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        seconds = self._seconds(clip, units)
        if self.glm:  # whole seconds of the first frame, after each unit
            whole = [int(2 * t / clip.fps) for t in range(units)]
            # vLLM writes GLM-4.6V's as whole seconds, too, where transformers writes tenths.
            later = type(self.processor).__name__ == "Glm46VProcessor"
            stamps = ["<|end_of_image|>" + (f"{s:.1f} seconds" if later else f"{s}") for s in whole]
            around = ["<|begin_of_video|>", *stamps]
            around = [text + "<|begin_of_image|>" for text in around[:-1]] + [around[-1] + "<|end_of_video|>"]
        else:
            around = [f"<|vision_end|><{second:.1f} seconds><|vision_start|>" for second in seconds]
            around = [around[0].removeprefix("<|vision_end|>"), *around[1:], "<|vision_end|>"]
        return [ids(text) for text in around]

    def _between_texts(self, texts: list[list[int]], unit: np.ndarray, vectors: torch.Tensor) -> Any:
        """Token ids and embeddings of a clip with the text around its units; `unit` is that of each of `vectors`."""
        ids: list[int] = []
        rows = []
        for t, text in enumerate(texts):
            inside = vectors[torch.from_numpy(unit == t)]
            before = self._embed(text)
            rows += [torch.nn.functional.pad(before, (0, vectors.shape[1] - before.shape[1])), inside]
            ids += [*text, *[self.clip_id] * len(inside)]
        return ids, torch.cat(rows)

    def _decode(self, rows: torch.Tensor, positions: np.ndarray, following: int, max_tokens: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config.get_text_config())
        inputs, *deep = rows[None].split(self.hidden, dim=-1)
        where, tokens, logprobs = torch.from_numpy(positions)[:, None], [], []
        # Rows of text are zero there, so they may be added to every place.
        extra = {}
        if deep:
            everywhere = torch.ones(inputs.shape[:2], dtype=torch.bool)
            extra = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [level[0] for level in deep]}
        for step in range(max_tokens):
            out = self.language_model(
                inputs_embeds=inputs, position_ids=where, past_key_values=cache, use_cache=True, **extra
            )
            extra = {}
            logits = self.model.lm_head(out.last_hidden_state[0, -1]).float()
            logprobs.append(torch.log_softmax(logits, dim=-1).numpy())
            tokens.append(int(logprobs[-1].argmax()))
            inputs = self._embed([tokens[-1]])[None]
            where = torch.full((3, 1, 1), following + step)
        return tokens, np.stack(logprobs)

    def _see_image(self, picture: Picture) -> tuple[torch.Tensor, tuple[int, int, int]]:
        seen = self.processor.image_processor(images=[picture.pixels], return_tensors="pt")
        _, h, w = seen["image_grid_thw"][0].tolist()
        return self._tower(seen["pixel_values"], seen["image_grid_thw"]), (1, h // 2, w // 2)

    def _hear(self, sound: Sound) -> tuple[torch.Tensor, int]:
        """Embeddings of a sound, and how many they are."""
        padding = "max_length" if "Qwen2_5" in type(self.model).__name__ else "longest"  # as their processors have it
        heard = self.processor.feature_extractor(
            sound.samples, sampling_rate=16000, padding=padding, return_attention_mask=True, return_tensors="pt"
        )
        out = self.model.get_audio_features(heard["input_features"], heard["attention_mask"])
        return out.last_hidden_state, len(out.last_hidden_state)

    def _tower(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Embeddings, with deepstack's beside them."""
        if self.glm:  # takes a clip as its frames
            ((units, rows, columns),) = grid.tolist()
            grid = torch.tensor([[1, rows, columns]] * units)
        out = self.visual(pixels, grid_thw=grid)
        return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=1)

    def _see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        """Full embeddings (N, hidden), the token grid, and the uint8 pixels (T, P, D) that are compared."""
        seen = self._process(clip)
        raw = self._process(clip, do_normalize=False, do_rescale=False)["pixel_values_videos"]
        assert raw.dtype == torch.uint8
        t, h, w = seen["video_grid_thw"][0].tolist()
        vectors = self._tower(seen["pixel_values_videos"], seen["video_grid_thw"])
        return vectors, (t, h // 2, w // 2), raw.numpy().reshape(t, (h // 2) * (w // 2), -1)

    def _process(self, clip: Clip, **settings: bool) -> Any:
        """What the video processor makes of all frames."""
        video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        look = self.processor.video_processor
        return look(videos=[video], return_tensors="pt", do_sample_frames=False, **settings)

    def _time_step(self, clip: Clip) -> float:
        """Position IDs per unit: Qwen2.5-VL and the Omni models count seconds (in fp32, like vLLM), Qwen2-VL units."""
        per_second = getattr(self.config, "position_id_per_seconds", None)
        per_second = getattr(self.config.vision_config, "tokens_per_second", per_second)
        if per_second is None:
            return 1.0
        return float(np.float32(self.config.vision_config.temporal_patch_size / clip.fps)) * per_second
