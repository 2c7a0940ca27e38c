# SPDX-License-Identifier: Apache-2.0
"""Times the parts of one run of vLLM's processor, in wall and in CPU time."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

STAGES = {
    "hash": "vLLM's hash of the frames",
    "hf": "Hugging Face's processor",
    "cells": "cells of the frames",
    "describe": "descriptors",
    "choose": "plan",
    "rows": "resize, lay out, normalise",
    "rest": "rest of vLLM's processor",
    "serialise": "serialise and copy",
}
"""In the order of a request. With EVS, Hugging Face's processor does all but the pixels."""


class Spent(NamedTuple):
    """Milliseconds on the clock, and of the thread's CPU time, which other processes disturb less."""

    wall: float
    cpu: float


class Clock:
    """Adds up what is spent in named parts; a part within another one is taken off it."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inner: list[list[float]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._inner.append([0.0, 0.0])
        before = _now()
        try:
            yield
        finally:
            took = [after - start for after, start in zip(_now(), before, strict=True)]
            inner = self._inner.pop()
            for part in range(2):
                self.spent[name][part] += took[part] - inner[part]
                if self._inner:
                    self._inner[-1][part] += took[part]

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return timed


def _now() -> tuple[float, float]:
    return 1e3 * time.perf_counter(), 1e3 * time.thread_time()


def timed_request(processor: Any, request: Any) -> dict[str, Spent]:
    """Runs one request through a processor and as far as its bytes leave the process.

    Args:
        processor: vLLM's, with EVS or without.
        request: A new ``ProcessorInputs``.

    Returns:
        By the names in `STAGES`, and "total".
    """
    from vllm.multimodal.processing import TimingContext
    from vllm.v1.serial_utils import MsgpackEncoder

    import evs_kernels
    from evs_vllm.core.learned import Learned
    from evs_vllm.engine import processor as ours
    from evs_vllm.families.seen import SeenFrames, SeenRows

    clock = Clock()
    parts: tuple[tuple[Any, str, str], ...] = (
        (type(processor), "_get_mm_hashes", "hash"),
        (type(processor), "_apply_hf_processor_main", "hf"),
        (evs_kernels, "pool_frames", "cells"),
        (Learned, "make", "describe"),
        (ours, "make_plan", "choose"),
        (SeenRows, "rows", "rows"),
        (SeenFrames, "rows", "rows"),
    )
    with ExitStack() as patched:
        for owner, name, stage in parts:
            patched.enter_context(patch.object(owner, name, clock.wrapped(stage, getattr(owner, name))))
        with clock.of("rest"):
            made = processor.apply(request, TimingContext(enabled=False))
    with clock.of("serialise"):
        frames = MsgpackEncoder().encode(made["mm_kwargs"].require_data()["video"])
        for frame in frames:  # as it goes to another process
            bytes(frame)
    times = {stage: Spent(*clock.spent[stage]) for stage in STAGES}
    return times | {"total": Spent(*(sum(spent[part] for spent in times.values()) for part in range(2)))}


def copied(array: np.ndarray) -> Spent:
    """A plain copy of as many bytes."""
    target = np.empty_like(array)
    target.fill(0)  # its memory is there
    clock = Clock()
    with clock.of("copy"):
        np.copyto(target, array)
    return Spent(*clock.spent["copy"])


def metadata_of(frames: int) -> dict[str, Any]:
    """What vLLM's loaders say of a clip of which every frame was sampled, at 2 a second."""
    return {
        "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip


def peak_bytes(run: Callable[[], Any]) -> int:
    """How much more memory the process had at most while it ran than before, or 0 where Linux does not say."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0

    def read(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    before = read("VmRSS")
    run()
    return read("VmHWM") - before
