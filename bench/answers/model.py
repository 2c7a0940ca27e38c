# SPDX-License-Identifier: Apache-2.0
"""The language model of `bench.answers`: a decoder with rotary positions of three axes over a tower's features.

A prompt is a first token, the clip's tokens, and questions. Several questions about a clip stand in one sequence, each
of which sees the clip and itself, as if it had been asked alone. Positions are those of Qwen2.5-VL: (time, row, column)
for what is seen, one number for all three axes for text, which goes on behind the largest of the clip's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bench.answers.questions import NUMBER_OF, VOCABULARY, Question

AXES = 3
TICKS = 2
"""Positions from one unit to the next, at the full frame rate."""
PADDING = -1


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        width: Numbers of a token, a multiple of `head`.
        layers: Layers.
        head: Numbers of an attention head.
        base: Of the rotary frequencies.
        dropout: While training, of what each half layer adds.
    """

    width: int = 256
    layers: int = 4
    head: int = 64
    base: float = 1000.0
    dropout: float = 0.0


def clip_positions(
    kept: torch.Tensor, grid: tuple[int, int, int], kind: str = "keep", ticks: int = TICKS
) -> tuple[torch.Tensor, int]:
    """Positions of a clip's tokens, and the first one of the text behind it.

    Args:
        kept: (K,) int64, sorted indices of the tokens that stay.
        grid: (T, rows, columns).
        kind: "keep": where the token was before others were dropped. "sequential": numbered like text, and the text
            behind goes on from there.
        ticks: Positions from one unit to the next.

    Returns:
        (K, 3) int64, and an int. The first position of a clip is 1, behind the first token.
    """
    units, rows, columns = grid
    if kind == "sequential":
        return 1 + torch.arange(len(kept))[:, None].expand(-1, AXES), 1 + len(kept)
    unit, place = kept // (rows * columns), kept % (rows * columns)
    seen = torch.stack([unit * ticks, place // columns, place % columns], dim=1)
    return 1 + seen, 2 + max((units - 1) * ticks, rows - 1, columns - 1)


@dataclass(frozen=True)
class Prompt:
    """A clip and questions about it.

    Attributes:
        features: (K, C) of the tokens that stay, any floating type.
        positions: (K, 3) int64 of them.
        text_from: The first position of each question.
        questions: What is asked.
    """

    features: torch.Tensor
    positions: torch.Tensor
    text_from: int
    questions: Sequence[Question]


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded at the end.

    Attributes:
        words: (B, L) int64, numbers of words; 0 where a token is seen or nothing is.
        features: (V, C) of all tokens that are seen, and `seen`, (B, L) bool, where they stand.
        positions: (B, L, 3) int64.
        part: (B, L) int64, 0 for the clip and what stands before it, then one number per question, `PADDING` behind.
        asks: (B, L) bool, the last word of each question.
        answers: (Q,) int64, the numbers of the right words, in the order of `asks`.
    """

    words: torch.Tensor
    features: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor
    part: torch.Tensor
    asks: torch.Tensor
    answers: torch.Tensor


def collate(prompts: Sequence[Prompt]) -> Batch:
    """Puts prompts side by side."""
    rows = []
    for prompt in prompts:
        count = len(prompt.features)
        words, part = [0] * (1 + count), [0] * (1 + count)
        asks, text = [False] * (1 + count), []
        for number, question in enumerate(prompt.questions, 1):
            words += [NUMBER_OF[word] for word in question.words]
            part += [number] * len(question.words)
            asks += [False] * (len(question.words) - 1) + [True]
            text += [prompt.text_from + index for index in range(len(question.words))]
        seen = [False] + [True] * count + [False] * len(text)
        places = torch.cat([
            torch.zeros(1, AXES, dtype=torch.int64),
            prompt.positions,
            torch.tensor(text, dtype=torch.int64)[:, None].expand(-1, AXES),
        ])  # fmt: skip
        rows.append((words, part, asks, seen, places))
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: int) -> torch.Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows])

    places = torch.stack([F.pad(row[4], (0, 0, 0, length - len(row[4]))) for row in rows])
    answers = [NUMBER_OF[question.answer] for prompt in prompts for question in prompt.questions]
    return Batch(
        words=padded(0, 0),
        features=torch.cat([prompt.features for prompt in prompts]).float(),
        seen=padded(3, False),
        positions=places,
        part=padded(1, PADDING),
        asks=padded(2, False),
        answers=torch.tensor(answers, dtype=torch.int64),
    )


class Reader(nn.Module):
    """The model.

    Args:
        features: Numbers of a token that the tower makes.
        shape: Its size.
    """

    def __init__(self, features: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # Set from the training scenes: features of towers have a few directions that are large for all of them.
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        width = shape.width
        self.merger = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.words = nn.Embedding(len(VOCABULARY), width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(VOCABULARY), bias=False)
        pairs = shape.head // 2
        self.register_buffer("frequencies", shape.base ** (-torch.arange(pairs) / pairs), persistent=False)
        self.apply(_initialise)

    def forward(self, batch: Batch) -> torch.Tensor:
        """(Q, words) fp32, what follows each question."""
        rows = self.words(batch.words)
        seen = self.merger((batch.features - self.mean) / self.spread).to(rows.dtype)
        rows = rows.masked_scatter(batch.seen[..., None], seen)
        turn = self._turns(batch.positions)
        allowed = visible(batch.part)
        for layer in self.layers:
            rows = layer(rows, turn, allowed)
        return self.head(self.norm(rows[batch.asks])).float()

    def _turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (B, 1, L, head/2): frequencies go to time, row and column in turns."""
        axis = torch.arange(len(self.frequencies)) % AXES
        angles = positions[..., axis] * self.frequencies
        return angles.cos()[:, None], angles.sin()[:, None]


class Layer(nn.Module):
    """Attention and a network, each added to what comes in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.head = shape.head
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, rows: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], allowed: torch.Tensor
    ) -> torch.Tensor:
        """(B, L, width) to the same; `allowed` is (B, 1, L, L) bool."""
        heads = self.mix(self.before(rows)).unflatten(-1, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0], heads[1], heads[2]
        query, key = turned(query, *turn).to(value.dtype), turned(key, *turn).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        rows = rows + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return rows + self.dropout(self.narrow(F.gelu(self.wide(self.between(rows)))))


def visible(part: torch.Tensor) -> torch.Tensor:
    """(B, L) parts to (B, 1, L, L) bool: a token sees the clip before it, and its own question up to itself."""
    length = part.shape[1]
    clip, same = (part == 0)[:, None, :], part[:, :, None] == part[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return ((clip | same) & before)[:, None]


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions: (B, heads, L, head), pairs of which are turned."""
    one, other = heads.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.03)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
