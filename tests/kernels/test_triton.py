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

    for module, name in ((score, "slice_kernel"), (score, "sum_kernel"), (select, "unit_kernel")):
        monkeypatch.setattr(module, name, Counting(name, getattr(module, name)))
    monkeypatch.setattr(select, "select_kernel", Counting("select_kernel", select.select_kernel))
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


def test_triton_warmup_launches_every_kernel(launches, monkeypatch):
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "triton")
    ek.warmup(device=DEVICE)
    assert set(launches) == {"slice_kernel", "sum_kernel", "unit_kernel", "select_kernel"}
