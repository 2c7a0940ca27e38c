# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to what vLLM sends its engine, part by part: stock vLLM and EVS in turns, on one thread.

No engine is started. Every row is checked first: all fields are stock vLLM's, pixels those of the tokens that are
computed. ``--renderer`` measures something else instead: how many clips a second vLLM's renderer manages, on one CPU
and on two. Example: ``python -m bench.frontend --out bench/results/frontend/frontend.json``
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from bench.common import clips, harness, tables
from bench.common.workers import on_cpus
from bench.frontend import renderer
from bench.frontend.stages import STAGES, Spent, copied, metadata_of, peak_bytes, timed_request

CLIPS = (
    clips.ClipSpec(0, 32, 720, 1280),
    clips.ClipSpec(0, 64, 720, 1280),
    clips.ClipSpec(0, 64, 1080, 1920),
    clips.ClipSpec(0, 128, 720, 1280),
    clips.ClipSpec(0, 64, 720, 1280, moving=0.1),
)
"""A real clip in which the camera moves, so that a tower that reuses computes much of what is dropped; a drawn one of
which a tenth moves."""

MOST_TOKENS = 768
"""Tokens of a frame at most: what the class of transformers says, whatever a model's files do."""

FRAMES_OF = {"internvl": 448, "internvl_chat": 448}
"""Families with whole frames, and pixels along a side of one, as in released models. Their pixels are normalised on the
host, to the type of the model."""

ROWS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "all, full": {"max_tokens": 10**9, "encoder": "full"},
    "0.5": {"rate": 0.5},
    "0.75": {"rate": 0.75},
    "0.9": {"rate": 0.9},
}
"""The settings of each row. Rate 0 is stock vLLM; "all" plans every clip and drops nothing."""


PROCESSOR = ("hf", "cells", "describe", "choose", "rows")
"""The stages that stand for what stock vLLM has Hugging Face's processor do."""


@dataclass
class Cell:
    """What was measured of a clip: by row and stage the samples, by row copies of the pixels, and sizes in bytes."""

    clip: str
    tokens: int
    samples: dict[str, dict[str, list[Spent]]]
    copies: dict[str, list[Spent]]
    sizes: dict[str, int]
    peaks: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small clip, two repeats: seconds; says nothing")
    parser.add_argument("--family", default="qwen2_5_vl", choices=["qwen2_5_vl", "qwen2_vl", "qwen3_vl", *FRAMES_OF])
    parser.add_argument("--clips", type=int, nargs="+", metavar="N", help="which of the five clips; default: all")
    parser.add_argument("--repeats", type=int, help="default: 9, with --renderer 3")
    parser.add_argument(
        "--renderer", action="store_true", help="measure vLLM's renderer with 8 clips at a time instead"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/frontend/<date>-<commit>-frontend.json")
    args = parser.parse_args()
    if args.renderer:
        measure_renderer(args)
        return
    torch.set_num_threads(1)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cpus:
        os.sched_setaffinity(0, cpus[-1:])
    environment = harness.environment()
    repeats = 2 if args.smoke else args.repeats or 9
    with tempfile.TemporaryDirectory() as folder:
        processors = make_processors(Path(folder), args.family)
        measured = []
        chosen = CLIPS if args.clips is None else [CLIPS[number] for number in args.clips]
        for spec in (clips.ClipSpec(0, 6, 100, 150),) if args.smoke else chosen:
            print(described(spec), flush=True)
            measured.append(measure(processors, spec, repeats))
    content = {
        "schema": harness.SCHEMA_VERSION,
        "bench": "frontend",
        "config": {"family": args.family, "repeats": repeats, "smoke": args.smoke, "most_tokens": MOST_TOKENS},
        "environment": environment,
        "cells": [vars(cell) for cell in measured],
    }
    write(content, report(measured), args.out or harness.default_path(harness.RESULTS, "frontend", "frontend"))


def measure_renderer(args: argparse.Namespace) -> None:
    """The other measurement, in processes pinned to one CPU and to two."""
    environment = harness.environment()
    frames, size, count, repeats = (8, (96, 160), 4, 1) if args.smoke else (64, (720, 1280), 16, args.repeats or 3)
    runs = {
        cpus: on_cpus(cpus, renderer.measure, args.family, MOST_TOKENS, frames, size, count, repeats)
        for cpus in renderer.CPUS
        if cpus <= len(os.sched_getaffinity(0))
    }
    content = {
        "schema": harness.SCHEMA_VERSION,
        "bench": "frontend-renderer",
        "config": {"family": args.family, "repeats": repeats, "smoke": args.smoke, "most_tokens": MOST_TOKENS},
        "environment": environment,
        "warnings": harness.warnings(environment),
        "runs": runs,
    }
    text = "\n".join([*content["warnings"], renderer.report(runs)])
    write(content, text, args.out or harness.default_path(harness.RESULTS, "frontend", "renderer"))


def write(content: dict[str, Any], text: str, out: Path) -> None:
    """Writes the result file and its tables beside it."""
    harness.write(content, out)
    out.with_suffix(".md").write_text(text)
    print(text)
    print(f"written to {out}")


def make_processors(folder: Path, family: str) -> dict[str, Any]:
    """vLLM's processor of a model for each of `ROWS`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from evs_vllm.engine.plugin import register
    from evs_vllm.testing import make_model

    register()
    if family in FRAMES_OF:
        from tests.families import registry

        sizes = {"frame_side": FRAMES_OF[family], "max_position_embeddings": 131072}
        model, dtype = registry.make_model(folder, family, **sizes), "bfloat16"
    else:
        sizes = {"max_tokens_per_frame": MOST_TOKENS, "max_position_embeddings": 131072}
        model, dtype = make_model(folder, family, **sizes), "float32"
    made = {}
    for row, evs in ROWS.items():
        extra = {} if evs is None else {"evs": evs}
        args = EngineArgs(
            model=str(model), dtype=dtype, max_model_len=131072, additional_config=extra, trust_remote_code=True
        )
        made[row] = MULTIMODAL_REGISTRY.create_processor(args.create_model_config())
    return made


def request_of(processor: Any, frames: np.ndarray) -> Any:
    from vllm.multimodal.processing import ProcessorInputs

    text = processor.dummy_inputs.get_dummy_text({"video": 1})
    prompt = processor.info.get_tokenizer().encode(text, add_special_tokens=False)
    return ProcessorInputs(prompt, processor.info.parse_mm_data({"video": [(frames, metadata_of(len(frames)))]}))


def fields_of(processor: Any, frames: np.ndarray) -> dict[str, Any]:
    from vllm.multimodal.processing import TimingContext

    made = processor.apply(request_of(processor, frames), TimingContext(enabled=False))
    return {name: elem.data for name, elem in made["mm_kwargs"].require_data()["video"][0].items()}


def pixels_of(fields: dict[str, Any]) -> str:
    """The name of the field of pixels."""
    (name,) = (name for name in fields if name.startswith("pixel_values"))
    return name


def raw(fields: dict[str, Any]) -> np.ndarray:
    """The bytes of the pixels; numpy has no bfloat16."""
    return fields[pixels_of(fields)].view(torch.uint8).numpy()


def plan_of(fields: dict[str, Any]) -> Any:
    from evs_vllm.core.plan import RetentionPlan

    return RetentionPlan.from_array(fields["evs_plan"].numpy())


def check(stock: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises ValueError where a field is not stock vLLM's."""
    from evs_vllm.families.plain_vit import packed_blocks

    plan = plan_of(fields)
    for name, value in stock.items():
        expected = value
        if name == pixels_of(stock) and plan.encoder == "reuse" and value.ndim == 4:
            expected = packed_blocks(value, plan)
        elif name == pixels_of(stock) and plan.encoder == "reuse":
            rows = value.view(plan.num_tokens, -1, value.shape[-1])
            expected = rows[torch.from_numpy(plan.computed)].flatten(0, 1)
        same = torch.equal(expected, fields[name]) if isinstance(value, torch.Tensor) else expected == fields[name]
        if not same:
            raise ValueError(f"{name} is not that of stock vLLM")


def described(spec: clips.ClipSpec) -> str:
    still = "" if spec.moving is None else f", drawn, {100 * spec.moving:g} % of it moving"
    return f"{spec.frames} frames of {spec.width}x{spec.height}{still}"


def measure(processors: dict[str, Any], spec: clips.ClipSpec, repeats: int) -> Cell:
    """All rows in turns, one clip."""
    clip = np.ascontiguousarray(np.stack(list(clips.frames_of(spec)))[..., ::-1])
    stock = fields_of(processors["stock"], clip)
    rows, tokens = {"stock": raw(stock)}, 0
    for row, processor in processors.items():
        if row != "stock":
            fields = fields_of(processor, clip)
            check(stock, fields)
            rows[row], tokens = raw(fields), plan_of(fields).num_tokens
    sizes = {"source": clip.nbytes} | {row: pixels.nbytes for row, pixels in rows.items()}
    samples: dict[str, dict[str, list[Spent]]] = {row: {} for row in processors}
    copies: dict[str, list[Spent]] = {name: [] for name in ("source", *rows)}
    for number in range(repeats + 1):
        for row, processor in processors.items():
            times = timed_request(processor, request_of(processor, clip))
            if number:  # the first one only warms up
                for stage, spent in times.items():
                    samples[row].setdefault(stage, []).append(spent)
        for name, pixels in {"source": clip, **rows}.items():
            copies[name].append(copied(pixels))
    peaks = {
        row: peak_bytes(lambda processor=processor: fields_of(processor, clip))  # type: ignore[misc]
        for row, processor in processors.items()
    }
    return Cell(described(spec), tokens, samples, copies, sizes, peaks)


def report(cells: Sequence[Cell]) -> str:
    """Markdown: for each clip the medians of all stages, totals with their spread, memory."""
    lines = []
    for cell in cells:
        rows = [row for row in cell.samples if row in ROWS]
        lines += ["", f"**{cell.clip}**, {cell.tokens} tokens, ms", ""]
        body = []
        for stage, words in {**STAGES, "total": "total"}.items():
            body.append([words, *(f"{_median(cell.samples[row][stage], 1):.1f}" for row in rows)])
        for words, parts in (("processor and planning", PROCESSOR), ("total", ("total",))):
            sums = [sum(_median(cell.samples[row][part], 1) for part in parts) for row in rows]
            body.append([f"{words}: faster than stock", *(f"{sums[0] / own:.1f}x" for own in sums)])
        body.append(["total, wall", *(_spread(cell.samples[row]["total"]) for row in rows)])
        body.append(["pixels, MB", *(f"{cell.sizes[row] / 1e6:.1f}" for row in rows)])
        body.append(["a copy of the pixels", *(f"{_median(cell.copies[row], 1):.1f}" for row in rows)])
        body.append(["memory at most, MB", *(f"{cell.peaks[row] / 1e6:.0f}" for row in rows)])
        lines += tables.markdown(["CPU time, medians", *rows], body, "lr")
        copy = _median(cell.copies["source"], 1)
        lines += ["", f"A copy of the source ({cell.sizes['source'] / 1e6:.0f} MB): {copy:.1f} ms."]
    return "\n".join([*lines[1:], ""])


def _median(samples: Sequence[Spent], part: int) -> float:
    return statistics.median(spent[part] for spent in samples)


def _spread(samples: Sequence[Spent]) -> str:
    wall = sorted(spent.wall for spent in samples)
    return f"{statistics.median(wall):.0f} ({wall[0]:.0f} to {wall[-1]:.0f})"


if __name__ == "__main__":
    main()
