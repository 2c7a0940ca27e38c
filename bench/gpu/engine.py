# SPDX-License-Identifier: Apache-2.0
"""Step "engine": where the time to the first token goes inside vLLM's engine, and how many requests a second it serves.

Qwen2.5-VL-7B's shapes with dummy weights, or the checkpoint that ``--model`` names. Kept apart, because a server runs
them in different processes: the processor (all that an API server does with a decoded clip, on one thread) and the
engine, from the request handed over to its first token; within the engine, by CUDA events, the vision tower and the
language model. The rows take turns, round by round; medians, with the smallest and largest value. Then one call of the
tower is looked into: its kernels, and the lines of Python that wait for the GPU. With ``--device cpu`` on a tiny model,
to try the program.
"""

import itertools
import os
import statistics
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process, where its parts can be timed
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

from bench.gpu import model as models
from bench.gpu.step import Asked, asked
from evs_vllm.testing import synthetic_clip

IN_FLIGHT = 8
ANSWER_TOKENS = 16
"""Of each request when requests per second are counted."""

QUESTION = "What moves?"
REUSED = 0.75
"""The rate whose tower is looked into."""

EVS_ROWS: dict[str, dict[str, Any]] = {
    "nothing dropped": {"evs_rate": 0},
    f"{REUSED}, full tower": {"evs_rate": REUSED, "evs_encoder": "full"},
    **{f"{rate}, reuse": {"evs_rate": rate, "evs_encoder": "reuse"} for rate in (0.5, REUSED, 0.9)},
}
STOCK_ROWS: dict[str, dict[str, Any]] = {f"vLLM's --video-pruning-rate {REUSED}": {}}


@dataclass(frozen=True)
class ClipSize:
    """Clips of one size: `frames` of `side` x `side` pixels, asked about in so many rounds after the first."""

    frames: int
    side: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.side}x{self.side}"


SIZES = (ClipSize(32, 512, 7), ClipSize(16, 336, 9), ClipSize(128, 336, 5))
SMOKE_SIZES = (ClipSize(8, 112, 2),)


def main(run: Asked, stock: bool = False) -> None:
    """Measures an engine with the plugin, or without it and with vLLM's own pruning."""
    if stock:
        os.environ["VLLM_PLUGINS"] = "none"
    engine = Engine(run, stock)
    rows = STOCK_ROWS if stock else EVS_ROWS
    sizes = SMOKE_SIZES if run.smoke else SIZES
    measurements: list[tuple[str, Callable[[], None]]] = []

    def later(what: str, measure: Callable[..., None], *own: Any) -> None:
        measurements.append((what, partial(measure, run, engine, *own)))

    later(f"first tokens, {sizes[0]}", first_tokens, rows, sizes[0])
    for name in () if stock else ("nothing dropped", f"{REUSED}, reuse"):
        later(f"the tower, {name}", look_into, name, rows[name], sizes[0])
    later(f"requests, {sizes[0]}", requests, rows, sizes[0])
    for size in sizes[1:]:
        later(f"first tokens, {size}", first_tokens, rows, size)
    for what, measure in measurements:
        if run.late:
            run.findings.note(f"Left out for want of time: {what}.")
            continue
        try:
            measure()
        except Exception as error:  # the other measurements may still work
            traceback.print_exc()
            run.findings.problem(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Watched:
    """Times of a model's method on the device and on the host; nothing waits before they are read."""

    def __init__(self, cls: type, name: str, on_gpu: bool) -> None:
        self.stock, self.kwargs = getattr(cls, name), {}
        self._on_gpu, self._marks, self._host = on_gpu, [], 0.0

        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
            started = time.perf_counter()
            if marks:
                marks[0].record()
            result = self.stock(model, *args, **kwargs)
            if marks:
                marks[1].record()
            self._host += time.perf_counter() - started
            self._marks.append(marks)
            self.kwargs = kwargs
            return result

        setattr(cls, name, timed)

    def read(self) -> tuple[float, float]:
        """(ms on the device, ms on the host) of the calls since it was read last. Without a GPU both are the host's."""
        host = self._host * 1e3
        device = sum(start.elapsed_time(end) for start, end in self._marks) if self._on_gpu else host
        self._marks, self._host = [], 0.0
        return device, host


class Engine:
    """A vLLM engine in this process, whose tower and language model are watched."""

    def __init__(self, run: Asked, stock: bool) -> None:
        from transformers import AutoProcessor
        from vllm import LLM

        self._on_gpu = run.on_gpu
        folder, load = models.of(run.model, tiny=run.smoke)
        longest = 4096 if run.smoke else 32768
        own = {"video_pruning_rate": REUSED} if stock else {}
        evs = {} if stock else {"additional_config": {"evs": {"rate": 0, "request_overrides": "any"}}}
        self.llm: Any = LLM(
            folder,
            load_format=load,
            dtype="bfloat16" if run.on_gpu else "float32",
            enforce_eager=True,
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=IN_FLIGHT,
            # A clip that is sent again is a new one, for the processor and for the tower.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"image": 0, "video": 1},
            **({"gpu_memory_utilization": 0.6} if run.on_gpu else {}),
            **own,
            **evs,
        )
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        if stock and not run.on_gpu:
            runner.is_multimodal_pruning_enabled = True  # vLLM's CPU engine forgets to, and crashes
        self.model = runner.model
        self.tower = Watched(type(self.model), "embed_multimodal", run.on_gpu)
        self.language = Watched(type(self.model), "forward", run.on_gpu)
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        self._prompt = AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        self._clips: dict[tuple[int, int], Any] = {}
        self._ids = itertools.count()
        run.findings.note(f"{_said(runner, self.model)} Model: {run.model or f'made here ({load} weights)'}.")

    def render(self, size: ClipSize, kwargs: Mapping[str, Any]) -> Any:
        """What an API server does with a request: tokenizer, processor, planning, layout of the prompt."""
        from tests.families.processing import metadata_for

        frames = self._clips.get((size.frames, size.side))
        if frames is None:
            frames = synthetic_clip(size.frames, (size.side, size.side), noise=2, seed=1)
            self._clips[size.frames, size.side] = frames
        (rendered,) = self.llm._preprocess_cmpl(
            [
                {
                    "prompt": self._prompt,
                    "multi_modal_data": {"video": [(frames, metadata_for(frames, 2.0))]},
                    "mm_processor_kwargs": dict(kwargs),
                }
            ]
        )
        return rendered

    def answer(self, rendered: list[Any], tokens: int) -> list[Any]:
        """The engine's outputs for requests that are sent at once."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for item in rendered:
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            engine.add_request(f"bench-{next(self._ids)}", item, params)
        done = []
        while engine.has_unfinished_requests():
            done += [output for output in engine.step() if output.finished]
        return done

    def one(self, size: ClipSize, kwargs: Mapping[str, Any]) -> dict[str, float]:
        """One request to its first token: milliseconds of its parts, and the tokens of its prompt."""
        self.wait()
        self.tower.read(), self.language.read()
        begin = time.perf_counter()
        rendered = self.render(size, kwargs)
        handed_over = time.perf_counter()
        (output,) = self.answer([rendered], 1)
        end = time.perf_counter()
        self.wait()
        tower, host = self.tower.read()
        return {
            "prompt": len(output.prompt_token_ids),
            "all": (end - begin) * 1e3,
            "processor": (handed_over - begin) * 1e3,
            "engine": (end - handed_over) * 1e3,
            "tower": tower,
            "tower's host": host,
            "language": self.language.read()[0],
        }

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


PARTS = ("all", "processor", "engine", "tower", "tower's host", "language")


def first_tokens(run: Asked, engine: Engine, rows: Mapping[str, Mapping[str, Any]], size: ClipSize) -> None:
    """Times to the first token of every row, in turns. What a row's first request compiles is shown apart."""
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(size.rounds + 1):
        for name, kwargs in rows.items():
            samples[name].append(engine.one(size, kwargs))
        if run.late and turn > 1:
            break
    head = ("row", "prompt tokens", *(f"{part}, ms" for part in PARTS), "against the first row", "first request, ms")
    run.findings.table(f"To the first token, {size}, {len(samples[next(iter(rows))]) - 1} rounds", *head)
    base = statistics.median(sample["all"] for sample in samples[next(iter(rows))][1:])
    for name, (first, *rest) in samples.items():
        middle = statistics.median(sample["all"] for sample in rest)
        parts = [_spread([sample[part] for sample in rest]) for part in PARTS]
        run.findings.row(name, int(first["prompt"]), *parts, f"{base / middle:.2f}x", f"{first['all']:.0f}")


def requests(run: Asked, engine: Engine, rows: Mapping[str, Mapping[str, Any]], size: ClipSize) -> None:
    """Requests a second of the engine alone, its inputs ready, and what one processor prepares in a second."""
    title = f"Requests a second, {size}, {IN_FLIGHT} in flight, {ANSWER_TOKENS} tokens each"
    run.findings.table(title, "row", "the engine", "one processor")
    count = 2 if run.smoke else 3 * IN_FLIGHT
    for name, kwargs in rows.items():
        begin = time.perf_counter()
        ready = [engine.render(size, kwargs) for _ in range(count)]
        prepared = time.perf_counter()
        engine.answer(ready, ANSWER_TOKENS)
        end = time.perf_counter()
        run.findings.row(name, f"{count / (end - prepared):.2f}", f"{count / (prepared - begin):.2f}")
        if run.late:
            return


def look_into(run: Asked, engine: Engine, name: str, kwargs: Mapping[str, Any], size: ClipSize) -> None:
    """The kernels of one call of the tower, and where its Python waits for the GPU."""
    engine.one(size, kwargs)
    inputs = engine.tower.kwargs
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as profile:
        engine.tower.stock(engine.model, **inputs)
        engine.wait()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    times: Counter[str] = Counter()
    for event in kernels:
        times[event.name[:70]] += event.device_time
    total = sum(times.values()) / 1e3
    run.findings.table(f"The tower, {name}: {len(kernels)} kernels and copies, {total:.1f} ms", "kernel", "ms")
    for kernel, microseconds in times.most_common(8):
        run.findings.row(kernel, f"{microseconds / 1e3:.2f}")
    if run.on_gpu:
        with waits_noted() as lines, torch.inference_mode():
            engine.tower.stock(engine.model, **inputs)
        where = ", ".join(f"{line} ({count})" for line, count in lines.most_common(15)) or "nowhere"
        run.findings.note(f"The tower, {name}: waits for the GPU {sum(lines.values())} times: {where}.")


@contextmanager
def waits_noted() -> Any:
    """Counts, by line of Python, what waits for the GPU within the block."""
    lines: Counter[str] = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield lines
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in seen:
        if "synchroniz" in str(warning.message):
            lines[f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}"] += 1


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _said(runner: Any, model: Any) -> str:
    """What of vLLM runs here, as far as it can be told of any model."""
    modules = [m for m in model.modules() if hasattr(m, "attn_backend") and hasattr(m, "_fa_version")]
    attention = (
        f"vision attention {modules[0].attn_backend.name}, FlashAttention {modules[0]._fa_version}"
        if modules
        else "vision attention of another kind"
    )
    return f"{type(runner).__module__}; {type(model).__name__}; {attention}."


if __name__ == "__main__":
    main(asked(__doc__))
