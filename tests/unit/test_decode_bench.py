# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoders: its files, its own way to decode against OpenCV, what it writes."""

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from bench.decode import sampled
from bench.decode.clips import FileSpec, write_h264
from bench.decode.sampled import Source, Track, Unusual, decode_sampled

pytestmark = pytest.mark.vllm


def pictures(rng: np.random.Generator, spec: FileSpec) -> np.ndarray:
    """Blocks that move over others, so that frames are predicted from each other."""
    coarse = rng.integers(0, 256, (spec.height // 8 + 1, spec.width // 8 + 1, 3), dtype=np.uint8)
    still = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[: spec.height, : spec.width]
    return np.stack([np.roll(still, (number * 3, number * 5), (0, 1)) for number in range(spec.frames)])


def made(tmp_path, spec: FileSpec, seed: int, name: str = "clip.mp4", **options: str) -> bytes:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    write_h264(iter(pictures(np.random.default_rng(seed), spec)), path, spec, **options)
    return path.read_bytes()


def by_opencv(data: bytes, num_frames: int) -> tuple[np.ndarray, list[int], dict]:
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    frames, metadata = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(data, num_frames=num_frames)
    return frames, metadata["frames_indices"], metadata


def chosen(num_frames: int):  # type: ignore[no-untyped-def]
    def choose(source: Source) -> list[int]:
        return np.linspace(0, source.frames - 1, min(num_frames, source.frames), dtype=int).tolist()

    return choose


def test_frames_are_those_of_opencv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Of any number of frames, key frames and B-frames, and of what libx264 does otherwise."""
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    kinds: list[dict[str, str]] = [{}, {"x264-params": "open-gop=1"}, {"intra-refresh": "1"}, {"b-pyramid": "strict"}]
    compared = 0
    for trial in range(10):
        kind = kinds[trial % len(kinds)]
        frames, keys, between = int(rng.integers(1, 70)), int(rng.integers(1, 30)), int(rng.integers(0, 5))
        spec = FileSpec(frames, 2 * int(rng.integers(24, 60)), 2 * int(rng.integers(24, 60)), keys, between)
        num_frames, threads = int(rng.integers(1, frames + 1)), int(rng.integers(1, 4))
        data = made(tmp_path, spec, trial, **kind)
        expected, numbers, metadata = by_opencv(data, num_frames)
        said = f"seed {seed}: {spec}, {kind}, {num_frames} frames"
        try:
            got, source, own = decode_sampled(data, chosen(num_frames), threads, lambda width, height: None)
        except Unusual:
            assert "intra-refresh" in kind, said  # not a key frame in it from which one could start
            continue
        assert own == numbers and np.array_equal(got, expected), said
        assert source == (metadata["total_num_frames"], metadata["fps"], metadata["duration"]), said
        compared += 1
    assert compared >= 7


def test_what_is_not_plain_is_not_decoded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = FileSpec(30, 64, 96, 10)
    whole = made(tmp_path, spec, 0, movflags="faststart")
    mkv = made(tmp_path, spec, 0, "clip.mkv")
    # The header is at the front, so the file opens, and its last frames are not there.
    for data in (whole[: len(whole) * 2 // 3], b"", b"no video at all" * 100, mkv, whole[:200]):
        with pytest.raises(Unusual):
            decode_sampled(data, chosen(8), 1, lambda width, height: None)


def test_large_frames_are_refused_before_they_are_decoded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def limit(width: int, height: int) -> None:
        raise ValueError(f"{width}x{height}")

    with pytest.raises(ValueError, match="96x64"):
        decode_sampled(made(tmp_path, FileSpec(3, 64, 96, 10), 0), chosen(2), 1, limit)


def test_what_the_decoder_has_to_see() -> None:
    # Decoded I P b b I b P: the second I is shown third, and a frame that comes after it in the file before it.
    track = Track(times=(0, 3, 1, 2, 6, 5, 8), starts=(0, 4), source=Source(7, 30.0, 7 / 30))
    assert track.needed({0}) == bytes((1, 0, 0, 0, 0, 0, 0))
    assert track.needed({1}) == bytes((1, 1, 1, 0, 0, 0, 0))
    assert track.needed({8}) == bytes((0, 0, 0, 0, 1, 1, 1))
    assert track.needed({5}) == bytes((1, 1, 1, 1, 1, 1, 0))  # leans on the frames before the key frame
    with pytest.raises(Unusual):
        Track(times=(1, 0), starts=(0,), source=Source(2, 30.0, 2 / 30)).needed({0})


def test_frames_that_nothing_leans_on_are_left_out(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen = []
    whole = sampled._whole
    monkeypatch.setattr(sampled, "_whole", lambda frames: seen.extend(frames) or whole(frames))
    data = made(tmp_path, FileSpec(60, 64, 96, 20), 0)
    decode_sampled(data, lambda source: [0, 45], 1, lambda width, height: None)
    assert 2 <= len(seen) <= 1 + 6 * 3  # frame 0; of frames 40 to 45 and a group of B-frames, some


def test_all_ways_on_a_small_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from bench.common import harness
    from bench.decode import __main__ as bench
    from bench.decode.measure import measure

    path = tmp_path / "clip.mp4"
    made(tmp_path, FileSpec(40, 64, 96, 12), 0)
    cells = measure(path, 1)
    assert [cell["frames"] for cell in cells] == [32, 40, 2]
    for cell in cells:
        for way in ("opencv", "only what is needed"):
            found = cell["ways"][way]
            assert found["same_numbers"] and found["most_apart"] == 0 and found["wall"][0] > 0
    assert "opencv_dynamic" not in cells[0]["ways"] and cells[2]["ways"]["opencv_dynamic"]["wall"]
    content = {
        "warnings": harness.warnings({"load_average": [9.0], "cpus": 2}),
        "cells": [{"file": "a clip", "megabits": 1.0, "cpus": 1, **cell} for cell in cells],
    }
    text = bench.report(content)
    assert (
        "busy machine" in text
        and "2 a second (2)" in text
        and "only what is needed: the same frame numbers in 3 of 3" in text
    )


def test_frames_that_differ_are_told_apart() -> None:
    from bench.decode.measure import compared

    frames = np.zeros((2, 4, 4, 3), np.uint8)
    other = frames.copy()
    other[1, 0, 0, 0] = 255
    assert compared((frames, [0, 5]), frames, [0, 5])["most_apart"] == 0
    assert compared((other, [0, 5]), frames, [0, 5]) == {
        "same_numbers": True, "most_apart": 255, "mean_apart": 255 / 96
    }  # fmt: skip
    assert compared((frames, [0, 6]), frames, [0, 5]) == {"same_numbers": False}
