# SPDX-License-Identifier: Apache-2.0
"""What only the Triton implementations promise: launches, no waiting, many blocks per unit."""

import pytest
import torch

import evs_kernels as ek
from evs_kernels.testing import SPECS, assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OK, REASON = ek.supported("prune_topk", "triton", DEVICE)
pytestmark = pytest.mark.skipif(not OK, reason=REASON)

WAITING = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__")
"""Methods of a tensor for which the host waits until the device is done."""


KERNELS = ("slice_kernel", "sum_kernel", "unit_kernel", "digit_kernel", "tally_kernel", "select_kernel")
"""What temporal_score and select_topk launch."""


def wait(*_, **__):
    raise AssertionError("the host waits for the device")


@pytest.fixture
def select():
    from evs_kernels.select_topk import _triton_kernels

    return _triton_kernels


@pytest.fixture
def launches(monkeypatch, select):
    """Names of the kernels launched, in order."""
    from evs_kernels.temporal_score import _triton_kernels as score

    seen = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        module = score if hasattr(score, name) else select
        monkeypatch.setattr(module, name, Counting(name, getattr(module, name)))
    return seen


@pytest.mark.parametrize("depth", [8, 1500])
@pytest.mark.parametrize("reserved", [0, 1])
def test_prune_topk_launches_and_never_waits(launches, monkeypatch, depth, reserved):
    clip = torch.ones((3, 2, depth), dtype=torch.uint8, device=DEVICE)
    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, wait)
        selection = ek.prune_topk(clip, 3, min_per_unit=reserved, backend="triton")
    assert 2 <= len(launches) <= 3
    assert len(selection.indices) == max(3, 2 + 2 * reserved)


@pytest.mark.parametrize("reserved", [0, 1])
@pytest.mark.parametrize("op", [ek.select_anchored, ek.select_hold])
def test_selecting_by_descriptors_never_waits_for_a_budget(monkeypatch, op, reserved):
    descriptors = torch.ones((3, 2, 16), dtype=torch.uint8, device=DEVICE)
    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, wait)
        selection = op(descriptors, 3, min_per_unit=reserved, backend="triton")
    assert len(selection.indices) == max(3, 2 + 2 * reserved)


def test_reading_frames_never_waits(monkeypatch):
    frames = torch.ones((3, 9, 12, 3), dtype=torch.uint8, device=DEVICE)
    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, wait)
        pooled = ek.pool_frames(frames, 2, 3, backend="triton")
        rows = ek.resize_patches(frames, 8, 8, None, 2, 2, backend="triton")
        placed = ek.place_blocks(rows, torch.ones((6, 256), device=DEVICE), 2, 3, backend="triton")
    assert pooled.shape == (2, 2, 3, 3) and rows.shape == (8, 96) and placed.shape == (2, 6, 8, 12)


def test_resize_patches_reuses_scratch(monkeypatch, generator):
    from evs_kernels.resize_patches import _triton_kernels

    monkeypatch.setattr(_triton_kernels, "SCRATCH_BYTES", 3000)
    monkeypatch.setattr(_triton_kernels, "BLOCK", 32)
    monkeypatch.setattr(_triton_kernels, "ROWS", 4)
    frames = torch.randint(0, 256, (3, 9, 12, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.tensor([0, 1, 5, 6, 7, 10])
    want = ek.resize_patches(frames, 12, 18, tokens, 2, 3, backend="ref")
    assert torch.equal(ek.resize_patches(frames.to(DEVICE), 12, 18, tokens, 2, 3, backend="triton").cpu(), want)


def test_select_anchored_counts_units_block_by_block(monkeypatch, generator):
    from evs_kernels.select_anchored import _triton_kernels

    monkeypatch.setattr(_triton_kernels, "BLOCK", 4)
    descriptors = torch.randint(0, 256, (12, 37, 3), dtype=torch.uint8, generator=generator)
    want = ek.select_anchored(descriptors, 200, min_per_unit=9, backend="ref")
    got = ek.select_anchored(descriptors.to(DEVICE), 200, min_per_unit=9, backend="triton")
    assert_same(tuple(part.cpu() for part in got), tuple(want))


@pytest.mark.parametrize("name", ["select_topk", "select_threshold", "prune_topk"])
def test_triton_many_blocks(name, select, monkeypatch, generator):
    """Small blocks, so that every loop runs several times on a clip the interpreter can do."""
    for constant, value in (("UNIT_BLOCK", 8), ("WRITE_BLOCK", 8), ("SEARCH_BLOCK", 32), ("PROGRAMS", 3)):
        monkeypatch.setattr(select, constant, value)
    spec = next(s for s in SPECS if s.name == name)
    shape = (5, 19, 300)[: 3 if name == "prune_topk" else 2]
    for dtype in spec.dtypes:
        for call in spec.calls(generator, dtype, shape):
            want = spec.op(*call.args, **call.kwargs, backend="ref")
            got = spec.op(call.args[0].to(DEVICE), *call.args[1:], **call.kwargs, backend="triton")
            assert_same(tuple(part.cpu() for part in got), tuple(want))


@pytest.mark.parametrize("name", ["select_topk", "prune_topk", "select_anchored", "select_hold"])
def test_triton_digits_counted_by_the_whole_grid(name, select, monkeypatch, generator):
    """As clips of more than SEARCHED tokens are, here with few tokens and small blocks."""
    for constant, value in (("SEARCHED", 0), ("DIGIT_BLOCK", 32), ("UNIT_BLOCK", 8), ("LARGE_WRITE_BLOCK", 8)):
        monkeypatch.setattr(select, constant, value)
    monkeypatch.setattr(select, "SEARCH_BLOCK", 2)
    spec = next(s for s in SPECS if s.name == name)
    shape = {"select_topk": (5, 19), "prune_topk": (5, 19, 300)}.get(name, (4, 19, 12))
    for dtype in spec.dtypes:
        for call in spec.calls(generator, dtype, shape):
            want = spec.op(*call.args, **call.kwargs, backend="ref")
            kwargs = {k: v.to(DEVICE) if k == "forced" else v for k, v in call.kwargs.items()}
            got = spec.op(call.args[0].to(DEVICE), *call.args[1:], **kwargs, backend="triton")
            assert_same(tuple(part.cpu() for part in got), tuple(want))


@pytest.mark.parametrize(
    ("values", "budget", "reserved"),
    [((-3, 4), 7777, 2), ((-(2**31), 2**31), 2001, 0), ((-(2**31), 2**31), 16999, 0), ((5, 6), 2500, 0)],
    ids=["ties", "few of all bits", "most of all bits", "one value"],
)
def test_triton_large_clips(select, generator, values, budget, reserved):
    """Of more tokens than one program searches, by the real constants."""
    scores = torch.randint(*values, (9, 2000), generator=generator).to(torch.int32)
    assert scores.numel() > select.SEARCHED
    want = ek.select_topk(scores, budget, min_per_unit=reserved, backend="ref")
    got = ek.select_topk(scores.to(DEVICE), budget, min_per_unit=reserved, backend="triton")
    assert_same(tuple(part.cpu() for part in got), tuple(want))


def test_triton_bytes_are_taken_as_words_where_a_token_has_whole_groups(generator):
    from evs_kernels.temporal_score import _triton_kernels as score

    words = score.WORDS if DEVICE == "cpu" else score.INSTRUCTION
    memory = torch.randint(0, 256, (5 * 3 * 1184 + 4,), generator=generator).to(torch.uint8)
    for depth, offset, kind in (
        (1184, 0, words),
        (16, 0, words),
        (1184, 4, words),
        (1184, 1, score.BYTES),
        (24, 0, score.BYTES),
    ):
        host = memory[offset : offset + 15 * depth].view(5, 3, depth)
        clip = memory.to(DEVICE)[offset : offset + 15 * depth].view(5, 3, depth)
        assert score.kind_of(clip) is kind, (depth, offset)
        assert torch.equal(ek.temporal_score(clip, backend="triton").cpu(), ek.temporal_score(host, backend="ref"))
    assert score.kind_of(clip.float()) is score.FLOATS


def test_triton_words_of_extremes():
    """0 against 255 in every byte of a word, where a sum of signed words would be wrong."""
    clip = torch.zeros((3, 1, 2048), dtype=torch.uint8, device=DEVICE)
    clip[1] = 255
    assert ek.temporal_score(clip, backend="triton").flatten().tolist() == [0, 255 * 2048, 255 * 2048]
    clip[2, 0, 3::4] = 128
    assert ek.temporal_score(clip, backend="triton").flatten().tolist() == [0, 255 * 2048, 255 * 1536 + 127 * 512]


def test_triton_large_clips_never_wait(monkeypatch, select):
    monkeypatch.setattr(select, "SEARCHED", 3)
    scores = torch.ones((3, 2), dtype=torch.int32, device=DEVICE)
    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, wait)
        selection = ek.select_topk(scores, 4, backend="triton")
    assert len(selection.indices) == 4


def test_triton_warmup_launches_every_kernel(launches, monkeypatch):
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "triton")
    ek.warmup(device=DEVICE)
    assert set(launches) == set(KERNELS)
