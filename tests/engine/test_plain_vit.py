# SPDX-License-Identifier: Apache-2.0
"""K/V reuse in plain ViTs: what is packed, in which rows it stands, and who attends to what."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.schedule import SCHEDULE
from evs_vllm.families.plain_vit import PlainTower, frame_rows, packed_blocks, packed_frames

pytestmark = pytest.mark.vllm

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE


def plan_of(units: int, side: int, density: float, seed: int) -> RetentionPlan:
    keep = np.random.default_rng(seed).random(units * side * side) < density
    keep[: side * side] = True
    return RetentionPlan((units, side, side), np.flatnonzero(keep), encoder="reuse")


plans = st.builds(
    plan_of, st.integers(1, 5), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 999)
)


@given(plan=plans)
@settings(deadline=None)
def test_packed_blocks_are_those_of_the_computed_tokens(plan: RetentionPlan) -> None:
    units, side, _ = plan.grid
    frames = torch.randn(units, 3, side * 6, side * 6)
    packed = packed_blocks(frames, plan)
    assert packed.shape == (packed_frames(plan), 3, side * 6, side * 6)

    def block(of: torch.Tensor, token: int) -> torch.Tensor:
        unit, slot = divmod(token, side * side)
        row, column = divmod(slot, side)
        return of[unit, :, row * 6 : row * 6 + 6, column * 6 : column * 6 + 6]

    for i, token in enumerate(plan.computed.tolist()):
        assert torch.equal(block(packed, i), block(frames, token))
    for i in range(len(plan.computed), len(packed) * side * side):
        assert not block(packed, i).any()


@given(plan=plans)
@settings(deadline=None)
def test_rows_begin_each_frame_with_the_class_token(plan: RetentionPlan) -> None:
    rows, is_patch = frame_rows(plan, 4)
    expected: list[tuple[int, int]] = []
    for unit in range(plan.num_units):
        tokens = [t % plan.tokens_per_unit for t in plan.computed.tolist() if t // plan.tokens_per_unit == unit]
        if tokens:
            expected += [(unit, 0)] + [(unit, 1 + 4 * token + j) for token in tokens for j in range(4)]
    starts = [i for i, (unit, _) in enumerate(expected) if i == 0 or expected[i - 1][0] != unit]
    assert rows.slots.tolist() == [slot for _, slot in expected]
    assert rows.units.tolist() == [*starts, len(expected)]
    assert is_patch.tolist() == [slot != 0 for _, slot in expected]
    assert rows.tokens_per_unit == 1 + 4 * plan.tokens_per_unit


class Attention(torch.nn.Module):
    num_heads, head_size, scale = HEADS, SIZE, SIZE**-0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: None = None) -> None:
        raise AssertionError("the stock attention ran")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.attn = Attention()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.attn(*self.qkv(hidden).chunk(3, dim=-1))


@torch.inference_mode()
def test_two_clips_together_equal_a_dense_tower_in_loops() -> None:
    from evs_vllm.engine.attention import wrap_attention

    torch.manual_seed(0)
    side, patch = 3, 5
    conv = torch.nn.Conv2d(3, WIDTH, patch, patch)
    layers, table = [Layer(), Layer(), Layer()], torch.randn(1 + 4 * side * side, WIDTH)
    tower = PlainTower(
        pixels="pixels",
        patch_embed=conv,
        pos_embed=lambda: table,
        pre_norm=torch.nn.LayerNorm(WIDTH, elementwise_affine=False),
        layers=layers,
        attention_of=lambda layer: layer.attn,
        project=lambda x: x.flatten(1),
    )
    for attention in tower.attentions():
        wrap_attention(attention)
    clips = [plan_of(4, side, 0.3, 1), plan_of(3, side, 0.1, 2)]
    videos = [torch.randn(plan.num_units, 3, side * 10, side * 10) for plan in clips]
    packed = [packed_blocks(video, plan) for video, plan in zip(videos, clips)]
    got = tower.encode({"pixels": torch.cat(packed)}, clips)
    assert torch.equal(got, tower.encode({"pixels": packed}, clips)), "clip by clip"
    expected = torch.cat([dense(layers, conv, table, video, plan) for video, plan in zip(videos, clips)])
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)
    assert not any(hasattr(attention, SCHEDULE) for attention in tower.attentions())


def dense(layers: list[Layer], conv: torch.nn.Conv2d, table: torch.Tensor, video: torch.Tensor, plan: RetentionPlan):  # type: ignore[no-untyped-def]
    units, side, _ = plan.grid
    across = 2 * side
    computed = set(plan.computed.tolist())
    hidden = torch.cat([table[:1].expand(units, 1, -1), conv(video).flatten(2).transpose(1, 2) + table[1:]], dim=1)
    hidden = torch.nn.functional.layer_norm(hidden, (WIDTH,))
    alive = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for unit in range(units):
        for slot in range(across * across):
            row, column = divmod(slot, across)
            alive[unit, 1 + slot] = (unit * side + row // 2) * side + column // 2 in computed
        alive[unit, 0] = alive[unit].any()
    for layer in layers:
        query, key, value = layer.qkv(hidden).view(*hidden.shape[:2], 3, HEADS, SIZE).unbind(2)
        for unit in range(1, units):
            for slot in range(hidden.shape[1]):
                if not alive[unit, slot]:
                    key[unit, slot], value[unit, slot] = key[unit - 1, slot], value[unit - 1, slot]
        weights = torch.softmax(torch.einsum("uqhd,ukhd->uhqk", query, key) * SIZE**-0.5, dim=-1)
        hidden = hidden + torch.einsum("uhqk,ukhd->uqhd", weights, value).flatten(2)
        hidden = torch.where(alive[:, :, None], hidden, torch.nan)
    tokens = hidden[:, 1:].view(units, side, 2, side, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(plan.num_tokens, -1)
    return tokens[torch.from_numpy(plan.computed)]
