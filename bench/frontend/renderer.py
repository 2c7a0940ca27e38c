# SPDX-License-Identifier: Apache-2.0
"""How many clips a second one API server can render: vLLM's renderer, 8 requests at a time, stock and EVS in turns.

No engine is started. What is measured is what ``vllm serve`` does before it hands a request to its engine: the renderer
of the engine's config, with vLLM's threads, its cache of processed clips off. ``python -m bench.frontend --renderer``
"""

import asyncio
import base64
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import clips, tables
from bench.common.clips import ClipSpec
from bench.decode.clips import FPS, FileSpec, video_file
from bench.frontend.stages import metadata_of

CPUS = (1, 2)
"""Processes are pinned to so many."""

IN_FLIGHT = 8
DISTINCT = 4
"""So many different clips take turns."""

ROWS: dict[str, dict[str, Any] | None] = {"stock": None, "0.75": {"rate": 0.75}}
HELD, SHORT, LONG = "decoded frames", "mp4 of these frames", "mp4 of 30 frames a second"
SOURCES = {
    HELD: "64 decoded frames of 1280x720",
    SHORT: "an mp4 file of just these frames",
    LONG: "H.264, 32 s of 1280x720, 30 frames a second and a key frame in 60, of which vLLM samples 64 frames",
}

Render = Callable[[int], Awaitable[Any]]
"""Renders the clip with this number and gives what the engine is sent."""


def measure(family: str, most_tokens: int, frames: int, size: tuple[int, int], count: int, repeats: int) -> list[dict]:
    """Times all rows in turns, for each source of clips.

    Args:
        family: Of the model.
        most_tokens: Of a frame at most.
        frames: Of each clip.
        size: Their height and width.
        count: Clips of each timed run.
        repeats: Timed runs; one goes before them.

    Returns:
        For each source and row: ``source``, ``row``, ``clips`` of a run, the ``seconds`` of the runs on the clock and
        their ``cpu`` time, and the ``bytes`` of a clip's pixels.
    """
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        renderers = make_renderers(Path(folder), family, most_tokens)
        cells = []
        for source in SOURCES:
            renders = {row: render_of(renderer, source, frames, size) for row, renderer in renderers.items()}
            cells += asyncio.run(_in_turns(renders, source, count, repeats))
        for renderer in renderers.values():
            renderer.shutdown()
    return cells


def make_renderers(folder: Path, family: str, most_tokens: int) -> dict[str, Any]:
    """vLLM's renderer of a model for each of `ROWS`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    from evs_vllm.engine.plugin import register
    from evs_vllm.testing import make_model

    register()
    model = make_model(folder, family, max_tokens_per_frame=most_tokens, max_position_embeddings=131072)
    made = {}
    for row, evs in ROWS.items():
        args = EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=131072,
            mm_processor_cache_gb=0,
            additional_config={} if evs is None else {"evs": evs},
        )
        made[row] = renderer_from_config(args.create_engine_config())
    return made


def render_of(renderer: Any, source: str, frames: int, size: tuple[int, int]) -> Render:
    """What renders clips of a source, all of them different for the first `DISTINCT` numbers."""
    specs = [ClipSpec(number, frames, *size) for number in range(DISTINCT)]
    if source == HELD:
        held = [np.ascontiguousarray(np.stack(list(clips.frames_of(spec)))[..., ::-1]) for spec in specs]
        text = renderer.get_mm_processor().dummy_inputs.get_dummy_text({"video": 1})

        async def render_frames(number: int) -> Any:
            clip = held[number % DISTINCT]
            prompt = {"prompt": text, "multi_modal_data": {"video": [(clip, metadata_of(len(clip)))]}}
            (made,) = await renderer.render_cmpl_async([prompt])
            return made

        return render_frames
    if source == SHORT:
        paths = [clips.clip_file(spec) for spec in specs]
    else:
        paths = [video_file(FileSpec(frames * FPS // 2, *size, 60))]
    urls = ["data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths]

    async def render_chat(number: int) -> Any:
        return await rendered_chat(renderer, urls[number % len(urls)])

    return render_chat


async def rendered_chat(renderer: Any, url: str) -> Any:
    """A chat completion about a video as far as vLLM's server takes it before its engine."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": clips.QUESTION}]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": content}])
    chat = request.build_chat_params(None, "auto").with_defaults({"tools": None, "tokenize": False})
    tokens = request.build_tok_params(renderer.model_config)
    _, (made,) = await renderer.render_chat_async([request.messages], chat, tokens)
    return made


async def _in_turns(renders: dict[str, Render], source: str, count: int, repeats: int) -> list[dict[str, Any]]:
    cells = {}
    for row, render in renders.items():
        pixels = video_of(await render(0))["pixel_values_videos"].data
        nbytes = pixels.numel() * pixels.element_size()
        cells[row] = {"source": source, "row": row, "clips": count, "bytes": nbytes, "seconds": [], "cpu": []}
    for number in range(repeats + 1):
        for row, render in renders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            await all_rendered(render, count)
            if number:  # the first one only warms up
                cells[row]["cpu"].append(time.process_time() - cpu)
                cells[row]["seconds"].append(time.perf_counter() - wall)
    return [*cells.values()]


async def all_rendered(render: Render, count: int) -> None:
    """Renders so many clips, `IN_FLIGHT` at a time, and serialises each as it is sent to an engine."""
    from vllm.v1.serial_utils import MsgpackEncoder

    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            made = await render(number)
            for part in MsgpackEncoder().encode(made["mm_kwargs"].require_data()["video"]):
                bytes(part)

    await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))


def video_of(made: Any) -> Any:
    """The fields of the video of what a renderer gave."""
    return made["mm_kwargs"].require_data()["video"][0]


def report(runs: dict[int, Sequence[dict[str, Any]]]) -> str:
    """Markdown: clips a second by source and row, for each number of CPUs.

    Args:
        runs: What `measure` gave, by CPUs.
    """
    body = []
    for cpus, cells in runs.items():
        for source in dict.fromkeys(cell["source"] for cell in cells):
            stock, own = ({cell["row"]: cell for cell in cells if cell["source"] == source}[row] for row in ROWS)
            factor = _clips_a_second(own) / _clips_a_second(stock)
            by_cpu = statistics.median(stock["cpu"]) / statistics.median(own["cpu"])
            body.append([source, str(cpus), _rate(stock), _rate(own), f"{factor:.2f}x", f"{by_cpu:.2f}x"])
    header = ["source", "CPUs", *(f"{row}, clips a second" for row in ROWS), "faster", "by CPU time"]
    lines = [
        f"vLLM's renderer, {IN_FLIGHT} clips at a time, and serialising what it made; medians (least to most).",
        "",
        *tables.markdown(header, body, "lr"),
        "",
        *(f"- {name}: {words}" for name, words in SOURCES.items()),
    ]
    return "\n".join([*lines, ""])


def _clips_a_second(cell: dict[str, Any]) -> float:
    return cell["clips"] / statistics.median(cell["seconds"])


def _rate(cell: dict[str, Any]) -> str:
    least, most = (cell["clips"] / pick(cell["seconds"]) for pick in (max, min))
    return f"{_clips_a_second(cell):.2f} ({least:.2f} to {most:.2f})"
