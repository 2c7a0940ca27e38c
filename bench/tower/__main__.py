# SPDX-License-Identifier: Apache-2.0
"""The vision tower alone: stock, full with pruning after it, and K/V reuse; in one vLLM process, in turns.

Also times other ways to write the attention of reuse, and reads the peak memory of each tower call. Every row is
checked first. Example: ``python -m bench.tower --out bench/results/cpu/tower.json``
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model must be in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.common import harness, tables
from bench.tower.attention import VARIANTS, one_by_one, sequences
from evs_vllm.core.schedule import ReuseSchedule

# The vision:language cost ratio of Qwen2.5-VL-7B at a size for two cores.
SIZES = {"hidden_size": 768, "layers": 12, "heads": 12, "kv_heads": 2, "vision_hidden": 384, "vision_layers": 8}
PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What moves?<|im_end|>\n<|im_start|>assistant\n"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=["qwen2_5_vl", "qwen2_vl"])
    parser.add_argument("--model", type=Path, help="a model folder instead of one with random weights made here")
    parser.add_argument("--clip", default="bikes")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--tokens-per-frame", type=int, default=240, help="at most; the clip is resized to it")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--variants-at", type=float, nargs="*", default=[0.75], help="rates at which to time variants")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave out the (slow) memory profile")
    parser.add_argument("--out", type=Path, help="result file. Default: bench/results/cpu/<date>-<commit>-tower.json")
    args = parser.parse_args()

    environment = harness.environment()
    with tempfile.TemporaryDirectory() as folder:
        tower = Tower(args, folder)
        rows = [harness.Row("stock vLLM", tower.runner(0), baseline=True, group="tower")]
        full = {"evs_encoder": "full", "evs_rate": args.rates[0]}
        rows.append(harness.Row("full tower, pruned after", tower.runner(**full), tower.checker(**full), "tower"))
        for rate in args.rates:
            plan = tower.plan(rate)
            note = f"of {plan.num_tokens} tokens {plan.num_kept} kept, {len(plan.computed)} computed"
            rows.append(harness.Row(f"reuse {rate}", tower.runner(rate), tower.checker(rate), "tower", note=note))
        for rate in args.variants_at:
            for name in IN_TOWER:
                attend = VARIANTS[name]
                title = f"reuse {rate}, {name}"
                run = tower.with_attention(attend, tower.runner(rate))
                check = tower.with_attention(attend, tower.checker(rate))
                rows.append(harness.Row(title, run, check, "tower"))
            rows += attention_rows(tower, rate)
        print(f"{len(rows)} rows", flush=True)
        clocks = [CpuClock(row.run) for row in rows]
        for row, clock in zip(rows, clocks, strict=True):
            row.run = clock
        with torch.inference_mode():
            results = harness.measure(rows, repeats=args.repeats, warmup=1)
            print("measured; now memory", flush=True)
            memory = {} if args.no_memory else tower.memory([0, *args.rates])
        state = {f"{rate}": state_bytes(tower, rate) for rate in args.rates}

    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    config |= {"sizes": SIZES, "torch_threads": torch.get_num_threads(), "grid": tower.plan(args.rates[0]).grid}
    content = harness.report("tower", config, results, environment)
    cpu_ms = {row.name: clock.median_ms(args.repeats) for row, clock in zip(rows, clocks, strict=True)}
    content |= {"cpu_ms": cpu_ms, "peak_bytes_of_the_call": memory, "bytes_per_layer": state}
    out = args.out or harness.default_path(harness.RESULTS, "cpu", "tower")
    harness.write(content, out)
    table = harness.markdown(results) + "\n\n" + side_tables(content)
    out.with_suffix(".md").write_text(table)
    print(table)
    print(f"\nwritten to {out}")


class CpuClock:
    """Runs something and notes the CPU time of all threads, which other processes disturb less than the wall time."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.samples: list[float] = []

    def __call__(self) -> Any:
        start = time.process_time()
        out = self.run()
        self.samples.append(1e3 * (time.process_time() - start))
        return out

    def median_ms(self, last: int) -> float | None:
        return statistics.median(self.samples[-last:]) if self.samples else None


class Tower:
    """An engine whose model is at hand, and the arguments that a clip gives its `embed_multimodal`."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        from vllm import LLM

        from evs_vllm.testing import make_model, real_clip_frames

        model = args.model or make_model(folder, args.family, max_tokens_per_frame=args.tokens_per_frame, **SIZES)
        self.llm: Any = LLM(
            str(model),
            additional_config={"evs": {"rate": 0, "request_overrides": "any"}},
            dtype=args.dtype,
            enforce_eager=True,
            max_model_len=16384,
            max_num_batched_tokens=16384,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
        )
        self.frames = real_clip_frames(args.clip, args.frames)
        self.tolerance = TOLERANCE[args.dtype]
        self.cache: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.wanted: dict[tuple[Any, ...], torch.Tensor] = {}

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def inputs(self, evs_rate: float, **kwargs: Any) -> dict[str, Any]:
        """What the runner gives the model for a request with these keys."""
        from vllm import SamplingParams

        key = (evs_rate, *sorted(kwargs.items()))
        if key not in self.cache:
            caught: list[dict[str, Any]] = []
            model, stock = self.model, self.model.embed_multimodal

            def catching(**given: Any) -> Any:
                caught.append(dict(given))
                return stock(**given)

            model.embed_multimodal = catching
            count = len(self.frames)
            metadata = {
                "fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count)),
                "video_backend": "opencv", "do_sample_frames": False,
            }  # fmt: skip
            request = {
                "prompt": PROMPT,
                "multi_modal_data": {"video": [(self.frames, metadata)]},
                "mm_processor_kwargs": {"evs_rate": evs_rate, **kwargs},
            }
            self.llm.generate(request, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            del model.embed_multimodal
            (self.cache[key],) = caught
        return self.cache[key]

    def plan(self, rate: float, **kwargs: Any) -> Any:
        from evs_vllm.core.plan import RetentionPlan
        from evs_vllm.engine.plan_field import PLAN_FIELD

        return RetentionPlan.from_array(self.inputs(rate, **kwargs)[PLAN_FIELD][0].numpy())

    def runner(self, evs_rate: float, **kwargs: Any) -> Callable[[], Any]:
        inputs = self.inputs(evs_rate, **kwargs)
        return lambda: self.model.embed_multimodal(**dict(inputs))

    def checker(self, evs_rate: float, **kwargs: Any) -> Callable[[], None]:
        """Full: kept rows of the stock tower. Reuse: what attention over keys gathered one by one gives."""
        run = self.runner(evs_rate, **kwargs)

        def check() -> None:
            plan = self.plan(evs_rate, **kwargs)
            (got,) = run()
            if plan.encoder == "full":
                (stock,) = self.runner(0)()
                want = stock[torch.from_numpy(plan.kept)]
            else:
                key = (evs_rate, *sorted(kwargs.items()))
                if key not in self.wanted:
                    (self.wanted[key],) = self.with_attention(one_by_one, run)()
                want = self.wanted[key]
            error = float((got - want).abs().max() / want.abs().max())
            if not error <= self.tolerance:
                raise ValueError(f"embeddings differ by {error:.1e}")

        return check

    def with_attention(self, attend: Callable[..., torch.Tensor], run: Callable[[], Any]) -> Callable[[], Any]:
        def replaced() -> Any:
            stock = ReuseSchedule.attend
            ReuseSchedule.attend = attend  # type: ignore[assignment, method-assign]
            try:
                return run()
            finally:
                ReuseSchedule.attend = stock  # type: ignore[method-assign]

        return replaced

    def memory(self, rates: list[float]) -> dict[str, dict[str, int]]:
        """Peak of torch's allocations during one call, above what stood before it, and the pixels that it was given."""
        from torch.profiler import ProfilerActivity, profile

        found = {}
        for rate in rates:
            run, level, peak = self.runner(rate), 0, 0
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                run()
            events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            for event in sorted(events, key=lambda e: e.start_ns()):
                level += event.nbytes()
                peak = max(peak, level)
            pixels = self.inputs(rate)["pixel_values_videos"]
            found["stock" if not rate else f"reuse {rate}"] = {
                "peak": peak,
                "pixels_travelled": pixels.numel() * pixels.element_size(),
            }
        return found


# The others are timed by their attention alone.
IN_TOWER = ("row state", "gather all, padded in buckets", "windows gathered, units by state")


def attention_rows(tower: Tower, rate: float) -> list[harness.Row]:
    """The attention alone, of one windowed and one full layer."""
    caught: dict[str, ReuseSchedule] = {}
    shapes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []

    def catching(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
        kind = "windows" if any(len(clip.windows) > 2 for clip in schedule.clips) else "whole units"
        caught.setdefault(kind, schedule)
        if not shapes:
            shapes.append((query.clone(), key.clone(), value.clone(), scale))
        return one_by_one(schedule, query, key, value, scale)

    with torch.inference_mode():
        tower.with_attention(catching, tower.runner(rate))()
    rows = []
    for kind, schedule in caught.items():
        want = one_by_one(schedule, *shapes[0])

        def check(attend: Any, schedule: ReuseSchedule = schedule, want: torch.Tensor = want) -> None:
            error = float((attend(schedule, *shapes[0]) - want).abs().max() / want.abs().max())
            if not error <= tower.tolerance:
                raise ValueError(f"attention differs by {error:.1e}")

        for name, attend in {"running state (in use)": ReuseSchedule.attend, **VARIANTS}.items():
            rows.append(
                harness.Row(
                    f"one layer's attention at {rate}, {kind}: {name}",
                    partial(attend, schedule, *shapes[0]),
                    partial(check, attend),
                    group=f"{kind} {rate}",
                    baseline=attend is ReuseSchedule.attend,
                )
            )
    return rows


def state_bytes(tower: Tower, rate: float) -> dict[str, int]:
    """Bytes of keys and values that are written per layer besides the projection's own output."""
    config = tower.model.config.vision_config
    width = getattr(config, "embed_dim", None) or config.hidden_size
    item = tower.model.visual.patch_embed.proj.weight.element_size()
    found: dict[str, int] = {}

    def catching(schedule: ReuseSchedule, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
        kind = "windows" if any(len(clip.windows) > 2 for clip in schedule.clips) else "whole units"
        found.setdefault("running state", 2 * len(key) * width * item)
        found.setdefault(f"gathered, {kind}", 2 * sum(len(k) for _, k in sequences(schedule)) * width * item)
        return query

    with torch.inference_mode():
        tower.with_attention(catching, tower.runner(rate))()
    return found


def side_tables(content: dict[str, Any]) -> str:
    times = [(name, f"{ms:.1f}") for name, ms in content["cpu_ms"].items() if ms is not None]
    lines = [*tables.markdown(("row", "median CPU ms, all threads"), times, "lr"), ""]
    if memory := content["peak_bytes_of_the_call"]:
        head = ("tower call", "peak MB above before", "pixels MB")
        sizes = [(k, f"{v['peak'] / 1e6:.1f}", f"{v['pixels_travelled'] / 1e6:.1f}") for k, v in memory.items()]
        lines += [*tables.markdown(head, sizes, "lr"), ""]
    written = [
        (f"{rate}", name, f"{count / 1e6:.1f}")
        for rate, found in content["bytes_per_layer"].items()
        for name, count in found.items()
    ]
    lines += tables.markdown(("rate", "keys and values written per layer", "MB"), written, "rlr")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
