# SPDX-License-Identifier: Apache-2.0
"""What a worker does between the pixels and the embeddings: one copy of indices to the device, and nothing waits."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.core.reuse import ClipRows, clip_rows
from evs_vllm.core.rows import keep_rows
from evs_vllm.core.schedule import Padded, ReuseSchedule, Varlen, place
from evs_vllm.families.base import ReuseTower
from evs_vllm.families.plain_vit import PlainTower, packed_blocks
from evs_vllm.families.qwen2_vl import Qwen2VLTower
from tests.unit.device_copies import META, DeviceCopies

pytestmark = pytest.mark.vllm

HEADS, SIZE, MERGE = 2, 4, 2
WIDTH = HEADS * SIZE


class Attention(torch.nn.Module):
    """What our code reads of vLLM's attention module."""

    num_heads, head_size, scale = HEADS, SIZE, SIZE**-0.5

    def __init__(self, backend: str, version: int | None) -> None:
        super().__init__()
        self.attn_backend, self._fa_version = SimpleNamespace(name=backend), version

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the stock attention ran")


class Layer(torch.nn.Module):
    def __init__(self, *backend: Any) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.attn = SimpleNamespace(attn=Attention(*backend))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.attn.attn(*self.qkv(hidden).chunk(3, dim=-1))


class Visual(torch.nn.Module):
    """A tower that is called as vLLM's Qwen2.5-VL is."""

    spatial_merge_size, window_size, patch_size, fullatt_block_indexes = MERGE, 8, 2, (1,)

    def __init__(self, *backend: Any) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Layer(*backend) for _ in range(3))

    @property
    def device(self) -> torch.device:
        return self.blocks[0].qkv.weight.device  # type: ignore[union-attr, return-value]

    def rotary_pos_emb_thw(self, t: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        phases = torch.arange(t * h * w * WIDTH, device=self.device).view(-1, MERGE**2, WIDTH).float()
        return phases.cos(), phases.sin()

    def forward(self, x: torch.Tensor, grid_thw: None, encoder_metadata: dict[str, Any]) -> torch.Tensor:
        hidden = x.view(-1, MERGE**2, WIDTH)[encoder_metadata["window_index"]].view(1, -1, WIDTH)
        hidden = hidden * encoder_metadata["rotary_pos_emb_cos"] + encoder_metadata["rotary_pos_emb_sin"]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.view(-1, MERGE**2 * WIDTH)[encoder_metadata["reverse_indices"]]


def plan_of(seed: int, grid: tuple[int, int, int]) -> RetentionPlan:
    chance = np.random.default_rng(seed).random(grid[0] * grid[1] * grid[2])
    chance[: grid[1] * grid[2]] = 0
    plan = RetentionPlan(
        grid,
        np.flatnonzero(chance < 0.3),
        encoder="reuse",
        refreshed=np.flatnonzero((chance >= 0.3) & (chance < 0.4)),
    )
    return plan.with_layout(Layout.contiguous(1, plan.num_tokens), plan.num_tokens)


PLANS = [plan_of(0, (4, 5, 5)), plan_of(1, (3, 5, 5)), plan_of(2, (2, 5, 5))]


def qwen(*backend: Any) -> tuple[ReuseTower, dict[str, Any]]:
    rows = sum(len(plan.computed) for plan in PLANS) * MERGE**2
    torch.manual_seed(0)
    return Qwen2VLTower(Visual(*backend)), {"pixel_values_videos": torch.randn(rows, WIDTH)}


def plain(*backend: Any) -> tuple[ReuseTower, dict[str, Any]]:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer(*backend) for _ in range(2))
    conv, table = torch.nn.Conv2d(3, WIDTH, 2, 2), torch.randn(1 + 100, WIDTH)
    tower = PlainTower(
        pixels="pixels",
        patch_embed=conv,
        pos_embed=lambda: table.to(conv.weight.device),
        layers=layers,  # type: ignore[arg-type]
        attention_of=lambda layer: layer.attn.attn,
        project=lambda x: x.flatten(1),
    )
    videos = [torch.randn(plan.num_units, 3, 20, 20) for plan in PLANS]
    return tower, {"pixels": torch.cat([packed_blocks(video, plan) for video, plan in zip(videos, PLANS)])}


def move(tower: Any) -> None:
    """Puts a tower on the device."""
    if isinstance(tower, Qwen2VLTower):
        tower._visual.to(META)
    else:
        tower.layers.to(META)
        tower.patch_embed.to(META)
        table = tower.pos_embed().to(META)
        tower.pos_embed = lambda: table


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel, one sequence after the other; on the device, its shape."""
    from vllm.v1.attention.backends import fa_utils

    def kernel(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **named: Any) -> torch.Tensor:
        assert named["fa_version"] == 3 and named["causal"] is False and q.is_contiguous()
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert type(named["max_seqlen_q"]) is type(named["max_seqlen_k"]) is int, "a tensor would have the host wait"
        out = torch.empty_like(q)
        if q.device == META:
            return out
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert named["max_seqlen_q"] == max(lengths_q) and named["max_seqlen_k"] == max(lengths_k)
        sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), out.split(lengths_q), strict=True)
        for q_, k_, v_, out_ in sequences:
            weights = (torch.einsum("qhd,khd->hqk", q_, k_) * named["softmax_scale"]).softmax(-1)
            out_.copy_(torch.einsum("hqk,khd->qhd", weights, v_))
        return out

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", kernel, raising=False)


BACKENDS = {
    "FLASH_ATTN": (3, Varlen),
    "TRITON_ATTN": (None, Padded),
    "TORCH_SDPA": (None, Padded),
    "FLASHINFER": (None, Padded),
    "ROCM_AITER_FA": (None, Padded),
}
backends = pytest.mark.parametrize("backend", BACKENDS)
towers = pytest.mark.parametrize("make", [qwen, plain], ids=lambda make: make.__name__)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The forms of schedules that were attended over, for each gathering of tokens."""
    seen: list[type] = []
    stock = ReuseSchedule.take

    def take(self: ReuseSchedule, *args: Any) -> torch.Tensor:
        seen.append(type(self.placed))
        return stock(self, *args)

    monkeypatch.setattr(ReuseSchedule, "take", take)
    return seen


@pytest.mark.usefixtures("flash")
@backends
@towers
def test_a_clip_takes_one_copy_of_indices_and_nothing_waits(make: Any, backend: str, used: list[type]) -> None:
    from evs_vllm.engine.attention import wrap_tower

    version, form = BACKENDS[backend]
    tower, batch = make(backend, version)
    wrap_tower(tower)
    move(tower)
    batch = {name: value.to(META) for name, value in batch.items()}
    with DeviceCopies() as device, torch.inference_mode():
        embeds = tower.encode(batch, PLANS)
    assert embeds.shape == (sum(len(plan.computed) for plan in PLANS), MERGE**2 * WIDTH) and embeds.device == META
    assert set(used) == {form}
    assert (device.copies, device.waits) == (1, [])
    with DeviceCopies() as device:
        kept = keep_rows(embeds.split([len(plan.computed) for plan in PLANS]), PLANS)
    assert [len(rows) for rows in kept] == [plan.num_kept for plan in PLANS]
    assert (device.copies, device.waits) == (1, [])


@pytest.mark.usefixtures("flash")
@backends
@towers
@torch.inference_mode()
def test_every_form_gives_what_the_loop_gives(
    make: Any, backend: str, used: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evs_vllm.core import schedule
    from evs_vllm.engine.attention import wrap_tower
    from evs_vllm.families import plain_vit, qwen2_vl

    version, form = BACKENDS[backend]
    tower, batch = make(backend, version)
    wrap_tower(tower)
    want = tower.encode(batch, PLANS)
    assert not used, "on a CPU nothing is gathered"
    for module in (plain_vit, qwen2_vl):
        monkeypatch.setattr(module, "form_on", lambda device, varlen: schedule.form_on(META, varlen))
    got = tower.encode(batch, PLANS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert set(used) == {form}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tower_without_the_kernel_is_named_in_the_log(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from evs_vllm.engine import attention

    said: list[str] = []
    monkeypatch.setattr(attention, "logger", SimpleNamespace(info_once=lambda text, *args: said.append(text % args)))
    attention.wrap_tower(qwen(backend, BACKENDS[backend][0])[0])
    assert not said, "on a CPU the loop is as fast"
    monkeypatch.setattr(attention, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    attention.wrap_tower(qwen(backend, BACKENDS[backend][0])[0])
    named = [text for text in said if f"attention {backend} takes one length" in text and "--evs-encoder full" in text]
    assert len(said) == len(named) == (backend != "FLASH_ATTN")


def test_the_watcher_sees_what_it_is_for() -> None:
    rows = torch.zeros(3, 2, device=META)
    for bad, name in (
        (lambda: rows.argsort(), "sort"),
        (lambda: rows[torch.zeros(3, dtype=torch.bool, device=META)], "index"),
        (lambda: rows.sum().item(), "_local_scalar_dense"),
        (lambda: (rows > 0).nonzero(), "nonzero"),
    ):
        with DeviceCopies() as device, suppress(RuntimeError, NotImplementedError):  # the device has no values
            bad()
        assert name in device.waits
    with DeviceCopies() as device:
        torch.zeros(3).to(META)
        torch.zeros(3).to(META)
    assert device.copies == 2


def test_schedules_of_a_tower_share_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, order = clip_rows(PLANS[0], 2)
    monkeypatch.setattr(ClipRows, "sequences", None)  # window after window is for the loop only: it takes long
    for form in ("varlen", "padded"):
        with DeviceCopies() as device:
            place([ReuseSchedule([rows.whole_units()], 4), ReuseSchedule([rows], 4)], form, META, [order, order])
        assert (device.copies, device.waits) == (1, [])
