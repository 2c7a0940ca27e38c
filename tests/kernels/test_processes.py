# SPDX-License-Identifier: Apache-2.0
"""Threads, forks, numba's cache: what a server does to these kernels."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import evs_kernels as ek
from evs_kernels import _parallel
from evs_kernels.place_blocks import _cpu as place_blocks
from evs_kernels.pool_frames import _cpu as pool_frames
from evs_kernels.select_hold import _cpu as hold

ROOT = str(Path(ek.__file__).parents[1])


def big_clip(generator):
    # Large enough that the work is split over threads.
    return torch.randint(0, 256, (6, 64, 4704), dtype=torch.uint8, generator=generator)


@pytest.fixture
def threads(monkeypatch):
    # Where a vLLM engine ran before, torch.set_num_threads does nothing any more.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def test_concurrent_calls(generator, threads):
    clips = [big_clip(generator) for _ in range(4)]
    frames = [torch.randint(0, 256, (6, 90, 120, 3), dtype=torch.uint8, generator=generator) for _ in range(4)]
    features = [torch.randn((5, 40, 512), generator=generator).bfloat16() for _ in range(4)]

    def work(i):
        clip, feature = clips[i % 4], features[i % 4]
        selection = ek.prune_topk(clip, 200, min_per_unit=2)
        descriptors = ek.pool_tokens(clip, 2, 3, 2, 14).flatten(2)
        anchored = ek.select_anchored(descriptors, 200, min_per_unit=2)
        held = ek.select_hold(descriptors, 200, min_per_unit=2)
        seen = ek.pool_frames(frames[i % 4], 12, 16), ek.resize_patches(frames[i % 4], 84, 112, None, 2, 14)
        return *selection, *anchored, *held, *seen, ek.cosine_score(feature)

    want = [work(i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(work, range(48))):
            assert all(torch.equal(a, b) for a, b in zip(got, want[i % 4], strict=True))


@pytest.mark.parametrize("cells", [4, 5])
def test_threads_share_the_tokens_of_a_clip(monkeypatch, generator, threads, cells):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)
    clip = big_clip(generator)
    assert torch.equal(
        ek.pool_tokens(clip, 2, 3, 2, 14, cells), ek.pool_tokens(clip, 2, 3, 2, 14, cells, backend="ref")
    )


def test_threads_share_the_cells_of_frames(monkeypatch, generator, threads):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)
    monkeypatch.setattr(pool_frames, "_GRAIN_BYTES", 1)
    frames = torch.randint(0, 256, (5, 41, 37, 3), dtype=torch.uint8, generator=generator)
    assert torch.equal(ek.pool_frames(frames, 7, 9), ek.pool_frames(frames, 7, 9, backend="ref"))


def test_threads_share_the_pictures(monkeypatch, generator, threads):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)
    monkeypatch.setattr(place_blocks, "_GRAIN_BYTES", 1)
    blocks = torch.randint(0, 256, (11, 3 * 5 * 5), dtype=torch.uint8, generator=generator)
    levels = torch.randn((3, 256), generator=generator).bfloat16()
    got, want = (ek.place_blocks(blocks, levels, 1, 2, backend=backend) for backend in ("cpu", "ref"))
    assert torch.equal(got, want)


def test_threads_share_the_places_of_a_clip(monkeypatch, generator, threads):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)
    monkeypatch.setattr(hold, "_CHUNK", 8)
    monkeypatch.setattr(hold, "_GRAIN_MEASURE", 64)
    monkeypatch.setattr(hold, "_GRAIN_PRICE", 64)
    clip = torch.randint(0, 256, (37, 41, 12), dtype=torch.uint8, generator=generator)
    want = ek.select_hold(clip, 500, min_per_unit=2, backend="ref")
    assert all(map(torch.equal, ek.select_hold(clip, 500, min_per_unit=2), want))


def _child(clip, queue):
    queue.put(ek.temporal_score(clip).sum().item())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork(generator, threads):
    clip = big_clip(generator)
    want = ek.temporal_score(clip).sum().item()  # the parent's pool exists now
    assert _parallel._pool is not None or _parallel._cpus() == 1
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(clip, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == want
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


@pytest.mark.parametrize("cpus", [1, 3, 16])
@pytest.mark.parametrize("items", [0, 1, 2, 5, 64])
def test_ranges_cover_every_item_once(monkeypatch, threads, cpus, items):
    monkeypatch.setattr(_parallel, "_cpus", lambda: cpus)
    seen = []
    _parallel.for_ranges(lambda lo, hi: seen.extend(range(lo, hi)), 7, 7 + items, grain=1)
    assert sorted(seen) == list(range(7, 7 + items))


def test_error_of_a_part_reaches_the_caller(monkeypatch, threads):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)

    def body(lo, hi):
        if hi == 8:
            raise KeyError("part")

    with pytest.raises(KeyError, match="part"):
        _parallel.for_ranges(body, 0, 8, grain=1)


def run_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ROOT} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


WARMUP = "import evs_kernels as e, torch; e.warmup(dtypes=(torch.uint8, torch.bfloat16)); "


def test_warmup_fills_the_cache_and_a_second_process_uses_it(tmp_path):
    count = (
        "from evs_kernels.temporal_score._cpu import _l1_uint8 as a;"
        "from evs_kernels.select_topk._cpu import _emit as b;"
        "from evs_kernels.pool_tokens._cpu import _pool_inside;"
        "from evs_kernels.pool_frames._cpu import _pool as c;"
        "from evs_kernels.resize_patches._cpu import _resize as d;"
        "print('compiled', *(sum(f.stats.cache_misses.values()) for f in (a, b, _pool_inside(2, 14, 7), c, d)))"
    )
    assert "compiled 1 1 1 1 1" in run_python(WARMUP + count, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
    assert "compiled 0 0 0 0 0" in run_python(WARMUP + count, NUMBA_CACHE_DIR=str(tmp_path))


def test_runs_where_no_cache_can_be_written():
    # Tests may run as root, who can write anywhere: refuse in numba's own check instead.
    code = (
        "import numba.core.caching as c\n"
        "def refuse(self): raise OSError('read-only file system')\n"
        "c._CacheLocator.ensure_cache_path = refuse\n"
    )
    out = run_python(code + WARMUP + "print('done')")
    assert "done" in out and "NUMBA_CACHE_DIR" in out


IMPORTS = "import torch, evs_kernels as e;"
FULL = (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"  # every write fails, as on a full disk
)
SCORE = (
    "clip = torch.arange(96, dtype=torch.uint8).view(2, 4, 12);"
    "assert torch.equal(e.temporal_score(clip), e.temporal_score(clip, backend='ref')); print('done')"
)


def test_runs_where_the_disk_is_full(tmp_path):
    out = run_python(IMPORTS + FULL + SCORE, NUMBA_CACHE_DIR=str(tmp_path))
    assert "done" in out and "Make room there" in out


def test_runs_where_the_cache_is_damaged(tmp_path):
    run_python(IMPORTS + SCORE, NUMBA_CACHE_DIR=str(tmp_path))
    kept = [path for path in tmp_path.rglob("*.nb?") if path.is_file()]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = run_python(IMPORTS + SCORE, NUMBA_CACHE_DIR=str(tmp_path))
    assert "done" in out and "empty it" in out


def test_warmup_compiles_everything_the_cpu_backend_uses(tmp_path):
    # After warm-up no call may compile: that is what the first request would wait for.
    code = (
        WARMUP
        + """
from numba.core import event
with event.install_recorder("numba:compile") as seen:
    clip = torch.randint(0, 256, (4, 5, 48), dtype=torch.uint8)
    s = e.temporal_score(clip)
    for m in (0, 2):
        e.prune_topk(clip, 9, min_per_unit=m); e.select_topk(s, 9, min_per_unit=m)
        e.select_threshold(s, 3.5, min_per_unit=m, max_tokens=9)
        e.select_anchored(clip, 9, min_per_unit=m, threshold=5, forced=s > 5, weights=torch.ones(4, dtype=torch.int32))
        e.select_hold(clip, 9, min_per_unit=m); e.select_hold(clip, 9, weights=torch.ones(4, dtype=torch.int32))
    for merge, channels, frames, side in ((2, 3, 2, 14), (2, 3, 2, 16), (1, 3, 1, 28), (1, 1, 1, 6)):
        pixels = torch.ones((2, 3, merge**2 * channels * frames * side**2), dtype=torch.uint8)
        e.pool_tokens(pixels, merge, channels, frames, side)
    e.cosine_score(clip.bfloat16()); e.select_topk(e.temporal_score(clip.bfloat16()), 9)
print("compilations", len(seen.buffer))
"""
    )
    assert "compilations 0" in run_python(code, NUMBA_CACHE_DIR=str(tmp_path))


def test_import_is_light():
    banned = "('vllm', 'evs_vllm', 'triton')"
    code = f"import sys, evs_kernels; print('loaded', [m for m in {banned} if m in sys.modules])"
    assert "loaded []" in run_python(code)
