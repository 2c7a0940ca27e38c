# SPDX-License-Identifier: Apache-2.0
"""Prints what plans compile after ``evs_kernels.warmup``: run by test_warmup.py in a process of its own.

``python compiled_kernels.py numba`` listens to numba's compiler. ``python compiled_kernels.py triton``, in Triton's
interpreter, finds for each launch the key by which Triton would look for a compiled kernel on a GPU.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import evs_kernels
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip, Source, TokenPixels
from evs_vllm.core.selection import make_plan
from evs_vllm.options import SELECTION_NAMES

# Bytes of a token, in whole groups of 16 (as Qwen-VL's) and others, for one program and for several. Few and small:
# Triton's interpreter is slow.
DEPTHS = (1040, 588, 48, 50)
# How the pixels of Qwen2.5-VL's and InternVL's tokens are ordered: for selections that look where a pixel is.
PIXELS = (TokenPixels(2, 3, 2, 14), TokenPixels(1, 3, 1, 28))
# (frames, height, width) and the rows and columns of tokens that become of them: larger, smaller, and as they are; a
# last unit that lacks a frame; sides that leave small tables on other alignments.
FRAMES = (((1, 50, 41), (2, 3)), ((3, 130, 40), (4, 1)), ((4, 56, 84), (2, 3)))
OPTIONS: tuple[dict[str, Any], ...] = (
    {"rate": 0.5},
    {"rate": 0.5, "min_tokens_per_unit": 2},
    {"max_tokens": 9, "min_tokens_per_unit": 1},
    {"threshold": 3.5},
    {"threshold": 3.5, "max_tokens": 7, "min_tokens_per_unit": 1},
    {"threshold": 200.0, "max_tokens": 9},
)


def plan_clips() -> None:
    """Plans random clips as first requests would, under all kinds of settings."""
    for units, side in ((1, 2), (4, 2)):
        for depth in DEPTHS:
            tokens = torch.randint(0, 256, (units, side * side, depth), dtype=torch.uint8)
            for options in OPTIONS:
                make_plan(Clip(tokens, (units, side, side)), EVSConfig(**options, selection="paper"))
        for pixels in PIXELS:
            tokens = torch.randint(0, 256, (units, side * side, pixels.values), dtype=torch.uint8)
            clip = Clip(tokens, (units, side, side), pixels)
            for options in OPTIONS:
                for selection in SELECTION_NAMES:
                    config = EVSConfig(**options, selection=selection, encoder="reuse", encoder_refresh=2)
                    make_plan(clip, config)


def plan_frames() -> None:
    """Plans decoded frames as the front end does, and makes the pixel rows of what is computed and of all."""
    for merge, side in ((2, 14), (2, 16)):
        size = merge * side
        for (count, height, width), (rows, columns) in FRAMES:
            frames = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
            grid = (-(-count // 2), rows, columns)
            blank = torch.empty((grid[0], rows * columns, 3 * 2 * size**2), dtype=torch.uint8, device="meta")
            clip = Clip(blank, grid, source=Source(frames, 2))
            for selection in ("learned", "contrast"):
                plan = make_plan(clip, EVSConfig(rate=0.5, selection=selection, encoder="reuse"))
                for tokens in (torch.from_numpy(plan.computed), None):
                    shape = (rows * size, columns * size)
                    evs_kernels.resize_patches(frames, *shape, tokens, merge, side, unit_frames=2)


@contextmanager
def numba_compilations() -> Iterator[list[str]]:
    from numba.core import event

    found: list[str] = []
    with event.install_recorder("numba:compile") as recorder:
        yield found
    found += [str(each.data["dispatcher"]) for _, each in recorder.buffer if each.is_start]


@contextmanager
def triton_keys() -> Iterator[list[str]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: list[str] = []
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = {name: value for name, value in self.kwargs.items() if name.startswith("do_not_specialize")}
        kernel = triton.JITFunction(self.fn, **named)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        found.append(f"{self.fn.__qualname__} {binder(*args, **kwargs)[1:]}")
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = recording
    try:
        yield found
    finally:
        InterpretedFunction.run = run


watch = {"numba": numba_compilations, "triton": triton_keys}[sys.argv[1]]
with watch() as first:
    evs_kernels.warmup()
with watch() as later:
    plan_clips()
    plan_frames()
new = set(later) - (set(first) if sys.argv[1] == "triton" else set())
print("warmed up", len(set(first)), "then", len(later), "new", len(new))
for name in sorted(new):
    print(name)
