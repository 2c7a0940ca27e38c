# SPDX-License-Identifier: Apache-2.0
"""Step "kernels": how long the kernels take on the device, by CUDA events.

The host is let run ahead, so that launches cost nothing, except in the rows marked *: those wait for the device, and
hold host time too. Inputs take turns, so that none is read out of the L2 cache. GB/s counts the fewest bytes that an op
must move; a copy within the device is the limit. With ``--device cpu`` it is numba's wall time, to try the program.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import evs_kernels as ek
from bench.gpu.ops import CLIPS
from bench.gpu.step import Asked, asked

HIDDEN = 3584
"""Width of Qwen2.5-VL-7B's embeddings."""

CELLS = (4, 4)
"""Cells of a token that the selection `learned` looks at."""

ROTATED_BYTES = 160_000_000
"""Inputs of a row are together at least this large: more than the L2 cache of an H200."""

AHEAD_CYCLES = 2_000_000
"""About a millisecond for which the device does nothing, so that the host gets ahead."""

PIXELS = (2, 3, 2, 14)
"""(merge, channels, frames, side) of Qwen2.5-VL's tokens."""

Call = Callable[[int], object]


class Timed(NamedTuple):
    """One row: `call(i)` does it with the i-th of its inputs and moves `moved` bytes; `waits` for the device or not."""

    name: str
    call: Call
    moved: int
    waits: bool = False


def main(run: Asked) -> None:
    """Times every op for clips of the sizes that are served."""
    run.findings.table("Times of the kernels", "clip", "op", "median us", "least us", "GB/s")
    shapes = ((3, 33, 4704),) if run.smoke else CLIPS
    for shape in shapes:
        if run.late:
            run.findings.note(f"Left out for want of time: kernels of {shape}.")
            continue
        for timed in rows(run.device, shape):
            measure(run, "x".join(map(str, shape)), timed, repeats=3 if run.smoke else 12 if shape[0] > 100 else 40)
        if run.on_gpu:
            torch.cuda.empty_cache()


def measure(run: Asked, shape: str, timed: Timed, repeats: int) -> None:
    """Adds a row, or a problem where the op fails."""
    clock = by_events if run.on_gpu and not timed.waits else by_wall
    try:
        times = clock(timed.call, repeats, run.on_gpu)
    except Exception as error:
        run.findings.problem(f"{timed.name} of {shape}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    middle, name = statistics.median(times), timed.name + (" *" if timed.waits else "")
    rate = f"{timed.moved / middle / 1e3:.0f}" if timed.moved else ""
    run.findings.row(shape, name, f"{middle:.1f}", f"{min(times):.1f}", rate)


def by_events(call: Call, repeats: int, on_gpu: bool = True) -> list[float]:
    """Microseconds on the device of each of `repeats` calls, after three that compile."""
    for turn in range(3):
        call(turn)
    torch.cuda.synchronize()
    times = []
    for turn in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        call(turn)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def by_wall(call: Call, repeats: int, on_gpu: bool) -> list[float]:
    """Microseconds of each of `repeats` calls with the device idle before and after, after one that compiles."""
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    times = []
    for turn in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call(turn)
        wait()
        times.append((time.perf_counter() - start) * 1e6)
    return times[1:]


def rows(device: str, shape: tuple[int, int, int]) -> Iterator[Timed]:
    """What is timed for clips of (units, tokens per unit, bytes per token)."""
    units, places, depth = shape
    tokens, size = units * places, units * places * depth
    generator = torch.Generator(device).manual_seed(0)
    budget = max(places, tokens // 4)

    def several(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        first = make()
        turns = max(2, -(-ROTATED_BYTES // first.nbytes)) if device == "cuda" else 2
        return [first, *(make() for _ in range(turns - 1))]

    def of(inputs: list[torch.Tensor], op: Callable[[torch.Tensor], object]) -> Call:
        return lambda turn: op(inputs[turn % len(inputs)])

    clips = several(lambda: torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator))
    target = torch.empty_like(clips[0])
    yield Timed("copy within the device (limit)", of(clips, target.copy_), 2 * size)
    yield Timed("temporal_score", of(clips, ek.temporal_score), size)
    yield Timed("prune_topk", of(clips, lambda clip: ek.prune_topk(clip, budget)), size)
    yield Timed("pool_tokens", of(clips, lambda clip: ek.pool_tokens(clip, *PIXELS, CELLS[0])), size)
    scores = ek.temporal_score(clips[0])
    level = float(scores.float().median())
    yield Timed("select_topk", lambda _: ek.select_topk(scores, budget), 4 * tokens)
    yield Timed("select_threshold", lambda _: ek.select_threshold(scores, level), 4 * tokens, waits=True)
    keys = (scores.long() << 32) - torch.arange(tokens, device=device).view(units, places)
    yield Timed("torch.topk of 64-bit keys, unsorted", lambda _: keys.view(-1).topk(budget, sorted=False), 8 * tokens)
    descriptors = several(lambda: clips[0][:, :, :48].contiguous())
    yield Timed("select_anchored", of(descriptors, lambda own: ek.select_anchored(own, budget)), descriptors[0].nbytes)
    yield Timed("select_hold", of(descriptors, lambda own: ek.select_hold(own, budget)), descriptors[0].nbytes)
    features = several(
        lambda: torch.randn((units, places, HIDDEN), device=device, generator=generator, dtype=torch.float32).bfloat16()
    )
    yield Timed("cosine_score", of(features, ek.cosine_score), features[0].nbytes)
    if device == "cuda":  # what moving the judging to the GPU would cost beside: the clip has to get there first
        host = clips[0].cpu()
        pinned = host.pin_memory()
        yield Timed("clip to the GPU, pageable", lambda _: target.copy_(host), size, waits=True)
        yield Timed("clip to the GPU, pinned", lambda _: target.copy_(pinned), size, waits=True)
        yield Timed("prune_topk on the CPU", lambda _: ek.prune_topk(host, budget), size, waits=True)


if __name__ == "__main__":
    main(asked(__doc__))
