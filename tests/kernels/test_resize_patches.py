# SPDX-License-Identifier: Apache-2.0
"""resize_patches against torch, the processors of Hugging Face, and arithmetic spelled out in fractions."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evs_kernels as ek
from evs_kernels import _parallel
from evs_kernels.resize_patches import _cpu
from evs_kernels.resize_patches._weights import real_weights, weights_of
from tests.reference import resize as spelled_out

BACKENDS = ["ref", "cpu", "triton"]
BITS = {"torch": None, "pillow": spelled_out.PILLOW_BITS}
ROOT = str(Path(ek.__file__).parents[1])


@pytest.fixture(params=BACKENDS)
def backend(request):
    ok, reason = ek.supported("resize_patches", request.param, "cpu")
    if not ok:
        pytest.skip(reason)
    return request.param


def number(generator, low, high):
    return int(torch.randint(low, high + 1, (), generator=generator))


def noise(generator, *shape):
    """Noise, half of it of blacks and whites only, at which a cubic kernel overshoots."""
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, values, values // 128 * 255)


def sizes(generator, size):
    """A source and a target along one side: smaller, larger, far apart, the same."""
    target = size * number(generator, 1, 5)
    source = [number(generator, 1, 30), number(generator, target // 2 + 1, 3 * target), 9 * target, target]
    return source[number(generator, 0, 3)], target


@pytest.mark.parametrize("arithmetic", list(BITS))
def test_equals_arithmetic_in_fractions(backend, arithmetic, generator):
    for _ in range(4):
        merge, side = number(generator, 1, 2), number(generator, 1, 4)
        height, width = (merge * side * number(generator, 1, 3) for _ in "hw")
        frames = noise(generator, number(generator, 1, 3), number(generator, 1, 30), number(generator, 1, 30), 3)
        unit_frames = number(generator, 1, 3)
        total = -(-len(frames) // unit_frames) * (height // (merge * side)) * (width // (merge * side))
        tokens = (torch.rand(total, generator=generator) < 0.6).nonzero().flatten()
        sizes = (height, width), (merge, side, unit_frames)
        got = ek.resize_patches(frames, *sizes[0], tokens, *sizes[1], arithmetic=arithmetic, backend=backend)
        want = spelled_out.token_rows(frames.numpy(), *sizes[0], tokens.tolist(), *sizes[1], BITS[arithmetic])
        assert got.tolist() == want


@pytest.mark.parametrize("arithmetic", list(BITS))
def test_weights_equal_fractions(arithmetic, generator):
    for _ in range(25):
        source, target = number(generator, 1, 300), number(generator, 1, 200)
        table = weights_of(source, target, arithmetic)
        want, bits = spelled_out.weights(source, target, BITS[arithmetic])
        got = [dict(enumerate(w.tolist(), f)) for f, w in zip(table.first.tolist(), table.weights, strict=True)]
        assert table.bits == bits
        assert [{j: w for j, w in places.items() if w} for places in got] == [
            {j: w for j, w in places.items() if w} for places in want
        ]


@pytest.mark.parametrize("source", [270, 360, 480, 540, 720, 854, 1080, 1280, 1920, 2160, 3840])
def test_no_weight_of_usual_sizes_is_a_toss_up(source):
    """A torch that rounds its last bit another way, as with fused multiplications, has the same weights."""
    for patch in (28, 32):
        for target in range(patch, 1300, patch):
            scaled = np.abs(real_weights(source, target)[1]) * 2.0 ** weights_of(source, target).bits
            assert (np.abs(scaled % 1 - 0.5) > 1e-9).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_equals_interpolate(generator, channels, layout):
    for _ in range(12):
        size = number(generator, 2, 33)  # of a single pixel torch 2.13 makes an error
        (high, height), (wide, width) = sizes(generator, size), sizes(generator, size)
        frames = noise(generator, number(generator, 1, 3), high, min(wide, 600), channels)
        pictures = frames.permute(0, 3, 1, 2)
        pictures = pictures.contiguous() if layout == "contiguous" else pictures
        want = torch.nn.functional.interpolate(pictures, (height, width), mode="bicubic", antialias=True)
        got = ek.resize_patches(frames, height, width, None, 1, 1, 1)
        assert torch.equal(got.view(len(frames), height, width, channels), want.permute(0, 2, 3, 1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_equals_pillow(generator, mode):
    image = pytest.importorskip("PIL.Image")
    channels = len(mode)
    for _ in range(12):
        size = number(generator, 1, 33)
        (high, height), (wide, width) = sizes(generator, size), sizes(generator, size)
        wide = min(wide, 600)
        frames = noise(generator, 2, high, wide, channels)
        pictures = [image.fromarray(frame.squeeze(2).numpy() if mode == "L" else frame.numpy()) for frame in frames]
        got = ek.resize_patches(frames, height, width, None, 1, 1, 1, arithmetic="pillow").view(2, height, width, -1)
        # At once where that begins with the columns; from version 13 on it does not where height shrinks more.
        steps = [(width, high), (width, height)] if high * width > height * wide else [(width, height)]
        for step in steps:
            pictures = [picture.resize(step, image.BICUBIC) for picture in pictures]
        want = np.stack([np.asarray(picture) for picture in pictures])
        assert np.array_equal(got.numpy(), want.reshape(got.shape))


def test_arithmetics_differ(generator):
    frames = noise(generator, 1, 90, 130, 3)
    one, other = (ek.resize_patches(frames, 56, 56, None, 1, 28, 1, arithmetic=name).int() for name in BITS)
    assert (one - other).abs().max() == 1
    with pytest.raises(ValueError, match="arithmetic: got 'PIL'; allowed: torch, pillow"):
        ek.resize_patches(frames, 56, 56, None, 1, 28, 1, arithmetic="PIL")


def test_torch_that_is_installed_resizes_the_same():
    assert ek.resize_matches_torch()


def test_torch_that_resizes_otherwise_is_noticed(monkeypatch):
    resize = torch.nn.functional.interpolate

    def other(pictures, *args, **kwargs):
        resized = resize(pictures, *args, **kwargs)
        resized[-1, -1, -1, -1] ^= 1
        return resized

    monkeypatch.setattr(torch.nn.functional, "interpolate", other)
    ek.resize_matches_torch.cache_clear()
    try:
        assert not ek.resize_matches_torch()
    finally:
        ek.resize_matches_torch.cache_clear()


PROCESSORS = {
    "Qwen2VLVideoProcessor": {"patch_size": 14, "cap_pixels_per_frame": False},
    "Qwen3VLVideoProcessor": {"patch_size": 16},
    "Glm4vVideoProcessor": {"patch_size": 14},
}


@pytest.mark.parametrize("form", ["numpy", "channels first"])
@pytest.mark.parametrize("name", list(PROCESSORS))
def test_equals_the_processor(name, form, generator):
    transformers = pytest.importorskip("transformers")
    given = PROCESSORS[name]
    processor = getattr(transformers, name)(merge_size=2, temporal_patch_size=2, **given)
    for _ in range(6):
        frames = noise(generator, number(generator, 2, 7), number(generator, 40, 260), number(generator, 40, 420), 3)
        scale = 2 ** number(generator, -1, 1) * 0.9
        pixels = int(frames[..., 0].numel() * scale)
        options = {"do_normalize": False, "do_rescale": False, "do_sample_frames": False, "return_tensors": "pt"}
        options["size"] = {"shortest_edge": 56 * 56, "longest_edge": max(pixels, 64 * 64 * 8)}
        video = frames.numpy() if form == "numpy" else frames.permute(0, 3, 1, 2).contiguous()
        seen = processor([video], input_data_format="channels_last" if form == "numpy" else "channels_first", **options)
        want, (units, rows, columns) = seen["pixel_values_videos"], seen["video_grid_thw"][0].tolist()
        assert want.dtype == torch.uint8
        side = given["patch_size"]
        tokens = (torch.rand(units * rows * columns // 4, generator=generator) < 0.5).nonzero().flatten()
        for chosen in (None, tokens):
            got = ek.resize_patches(frames, rows * side, columns * side, chosen, 2, side)
            want_tokens = want.view(units * rows * columns // 4, -1)
            assert torch.equal(got, want_tokens if chosen is None else want_tokens[chosen])


def test_every_number_of_values_read_at_once(generator):
    """From as many source pixels to fewer and fewer, so that a place sees 1, 4, 5 ... 40 of them."""
    frames = noise(generator, 1, 3, 340, 3)
    for width in [340, 360, *range(335, 30, -9)]:
        for name in BITS:
            got, want = (
                ek.resize_patches(frames, 4, width, None, 1, 1, 1, arithmetic=name, backend=b) for b in ("cpu", "ref")
            )
            assert torch.equal(got, want)


def test_threads_share_the_tokens(monkeypatch, generator):
    monkeypatch.setattr(_parallel, "_cpus", lambda: 4)
    monkeypatch.setattr(_cpu, "_GRAIN_BYTES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for side, merge in ((1, 1), (3, 1), (14, 2)):
            size = side * merge
            frames = noise(generator, 3, 70, 90, 3)
            total = 2 * 5 * 7
            tokens = (torch.rand(total, generator=generator) < 0.6).nonzero().flatten()
            got, want = (
                ek.resize_patches(frames, 5 * size, 7 * size, tokens, merge, side, backend=b) for b in ("cpu", "ref")
            )
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beside_the_rows(generator, monkeypatch):
    """Vectors are wider than patches; the rows are given room with a margin, which must stay as it was."""
    frames = noise(generator, 2, 40, 40, 3)
    for side in (1, 5, 14):
        tokens = torch.tensor([0, 2, 3])
        margin = torch.full((3 * 3 * 2 * side**2 + 64,), 7, dtype=torch.uint8)
        monkeypatch.setattr(_cpu, "empty", lambda shape, margin=margin: margin[32:-32].view(shape))
        got = ek.resize_patches(frames, 2 * side, 2 * side, tokens, 1, side, backend="cpu")
        assert torch.equal(got, ek.resize_patches(frames, 2 * side, 2 * side, tokens, 1, side, backend="ref"))
        assert (margin[:32] == 7).all() and (margin[-32:] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "+avx,+avx2,+ssse3,+sse4.1,+sse4.2,+popcnt"])
def test_cpus_with_shorter_vectors(features, tmp_path):
    code = (
        "import torch, evs_kernels as e\n"
        "g = torch.Generator().manual_seed(3)\n"
        "f = torch.randint(0, 256, (3, 70, 110, 3), dtype=torch.uint8, generator=g)\n"
        "for h, w, m, s in ((56, 84, 2, 14), (96, 32, 2, 16), (70, 220, 1, 5)):\n"
        "    a, b = (e.resize_patches(f, h, w, None, m, s, backend=b) for b in ('cpu', 'ref'))\n"
        "    assert torch.equal(a, b)\n"
        "print('equal')\n"
    )
    env = os.environ | {"PYTHONPATH": ROOT, "NUMBA_CACHE_DIR": str(tmp_path)}
    env |= {"NUMBA_CPU_NAME": "x86-64" if os.uname().machine == "x86_64" else "generic", "NUMBA_CPU_FEATURES": features}
    if os.uname().machine != "x86_64" and features:
        pytest.skip("features of another CPU")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
