# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to pixels: what a video processor is given, and its pixels without its work.

A processor that is watched (`watch_processor`) notes the frames of every video before it resizes them; clips are judged
by those. Of the processors in `evs_vllm.families.watched.PROVEN` it can also leave out the pixels, which are then made
of the tokens alone that a vision tower computes (`evs_vllm.families.seen`). All else that the processor returns, grids
among it, still comes from its own code: it runs on tensors without data, or on a single frame. Both happen within
`watching` only; outside of it a watched processor does what it always did.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

import evs_kernels
from evs_vllm.core.clip import Source
from evs_vllm.errors import RequestError
from evs_vllm.families.qwen2_vl import GRID, PIXELS
from evs_vllm.families.seen import SeenFrames, SeenRows, Squares
from evs_vllm.families.watched import BICUBIC, Watch, Watched, current_watch, levels_of, stock_of, unknown, watching
from evs_vllm.families.watched_vllm import WatchedInternVL, WatchedOvis

CELLS = "evs_cells"
"""The field in which a watched processor hands on the low-resolution pictures of its clips."""

CELLS_PER_TOKEN = 4
"""Cells along one side of a token in that field: what `evs_vllm.core.descriptors` looks at."""


class _WatchedTransformers(Watched):
    """Goes before the class of a video processor of transformers."""

    def preprocess(self: Any, videos: Any, **kwargs: Any) -> Any:
        if not self._evs_with_cells:
            return super().preprocess(videos, **kwargs)  # type: ignore[misc]
        with watching() as watch:
            out = super().preprocess(videos, **kwargs)  # type: ignore[misc]
        seen = [video for video in watch.seen if isinstance(video, SeenRows) and video.source is not None]
        if seen and len(seen) == len(watch.seen):
            out[CELLS] = torch.cat([cells_of(video) for video in seen])
        return out

    def _prepare_input_videos(self: Any, videos: Any, *args: Any, **kwargs: Any) -> Any:
        watch = current_watch()
        if watch is not None:
            watch.unpermuted = kwargs.get("input_data_format") is None and all(map(_colours_last, videos))
            if watch.unpermuted:
                # Saves the copy with colours first.
                videos = [torch.as_tensor(video).permute(0, 3, 1, 2) for video in videos]
        return super()._prepare_input_videos(videos, *args, **kwargs)  # type: ignore[misc]

    def _preprocess(self: Any, videos: Sequence[torch.Tensor], **kwargs: Any) -> Any:
        watch = current_watch()
        if watch is None:
            return super()._preprocess(videos, **kwargs)  # type: ignore[misc]
        why = _why_stock(self, videos, kwargs, watch) if watch.leave_rows else "pixels are wanted"
        if not why:
            bare = [torch.empty(video.shape, dtype=video.dtype, device="meta") for video in videos]
            out = super()._preprocess(bare, **kwargs)  # type: ignore[misc]
            why = "" if GRID in out else _why_not_squares(out, kwargs, watch)
        if why:
            whole = [video.contiguous() for video in videos] if watch.unpermuted else videos
            out = super()._preprocess(whole, **kwargs)  # type: ignore[misc]
        else:
            rows = out[PIXELS].shape[: 1 if GRID in out else 2]
            out[PIXELS] = torch.empty(*rows, 0, dtype=out[PIXELS].dtype, device=videos[0].device)
        sizes: list[Any] = [kwargs.get(name) for name in ("temporal_patch_size", "patch_size", "merge_size")]
        if GRID in out and None not in sizes:
            levels = None if why or not out[PIXELS].is_floating_point() else levels_of(self, kwargs)
            for video, grid in zip(videos, out[GRID], strict=True):
                shape = int(grid[0]), int(grid[1]), int(grid[2])
                source = _source_of(video, sizes[0], shape[0])
                watch.seen.append(SeenRows(source, why, levels, shape, sizes[1], sizes[2]))
        elif watch.squares is not None:
            levels = None if why else levels_of(self, kwargs)
            squashed = not why or not _why_not_squares(out, kwargs, watch)
            for video in videos:
                source = _source_of(video, 1, len(video)) if squashed else None
                watch.seen.append(SeenFrames(source, why, levels, watch.squares, "torch"))
        return out


def _reduced(self: Any, protocol: Any) -> Any:
    """How a watched processor is copied, and sent to other processes: its class is made there."""
    return _rebuild, (stock_of(type(self)), self._evs_with_cells, self.__dict__)


def _rebuild(stock: Any, with_cells: bool, attributes: Mapping[str, Any]) -> Any:
    processor = stock.__new__(_class(stock, with_cells))
    processor.__dict__.update(attributes)
    return processor


@cache
def _class(stock: Any, with_cells: bool) -> type:
    # Named as it was: processors are saved by the names of their classes.
    own = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    own |= {"_evs_with_cells": with_cells, "__reduce_ex__": _reduced}
    by_method = {"_videos_to_pixel_values_lst": WatchedInternVL, "preprocess_multidata": WatchedOvis}
    watched = next((mixin for name, mixin in by_method.items() if hasattr(stock, name)), _WatchedTransformers)
    return type(stock.__name__, (watched, stock), own)


def watch_processor(video_processor: Any, with_cells: bool = False) -> None:
    """Makes a video processor of transformers, or one of vLLM's, one that `watching` sees; twice is once.

    Args:
        video_processor: A video processor, or a processor that has none and sees to videos itself. Its class is
            replaced by a subclass of the same name.
        with_cells: Whether it also hands on the low-resolution pictures of its clips, as the field `CELLS` of what it
            returns: `cells_of` each, one after the other. It has no such field for videos without a source.
    """
    stock: Any = stock_of(type(video_processor))
    video_processor.__class__ = _class(stock, with_cells or getattr(video_processor, "_evs_with_cells", False))


def unwatch_processor(video_processor: Any) -> None:
    """Undoes `watch_processor`; other processors stay as they are."""
    if isinstance(video_processor, Watched):
        video_processor.__class__ = stock_of(type(video_processor))


def _source_of(video: torch.Tensor, unit_frames: int, units: int) -> Source | None:
    """The frames of a video, (F, 3, height, width), of which the processor made so many units."""
    if video.dtype != torch.uint8 or video.shape[1] != 3 or -(-len(video) // unit_frames) != units:
        return None
    return Source(video.permute(0, 2, 3, 1).contiguous(), unit_frames)


def cells_of(seen: SeenRows) -> torch.Tensor:
    """The low-resolution picture of a video with a source: (T * 4H * 4W, 3) uint8 for T units of H x W tokens."""
    assert seen.source is not None
    rows, columns = (CELLS_PER_TOKEN * size // seen.merge for size in seen.grid[1:])
    return evs_kernels.pool_frames(seen.source.frames, rows, columns, unit_frames=seen.source.unit_frames).view(-1, 3)


def sources_of_cells(cells: torch.Tensor, grids: Sequence[tuple[int, int, int]]) -> list[Source]:
    """The field `CELLS` of clips as frames, from which the same pictures are made.

    Args:
        cells: (n, 3) uint8.
        grids: (T, H, W) in tokens of each clip.

    Raises:
        RequestError: They do not fit.
    """
    shapes = [(t, CELLS_PER_TOKEN * h, CELLS_PER_TOKEN * w, 3) for t, h, w in grids]
    counts = [t * h * w for t, h, w, _ in shapes]
    if cells.dtype != torch.uint8 or tuple(cells.shape) != (sum(counts), 3):
        raise RequestError(
            f"{CELLS} has {cells.dtype} of shape {tuple(cells.shape)}, which does not fit clips of {grids}."
        )
    return [Source(own.view(shape), 1) for own, shape in zip(cells.split(counts), shapes, strict=True)]


def _colours_last(video: Any) -> bool:
    """Whether transformers takes a video for (F, H, W, 3) uint8 frames, of which a view is as good as a copy."""
    if isinstance(video, torch.Tensor):
        in_order = video.dtype == torch.uint8 and video.is_contiguous()
    else:
        in_order = isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.flags.c_contiguous
    return in_order and video.ndim == 4 and video.shape[3] == 3 and video.shape[1] not in (1, 3)


def _why_stock(processor: Any, videos: Sequence[torch.Tensor], kwargs: Mapping[str, Any], watch: Watch) -> str:
    """Why the rows of these videos are not proven equal, or ""."""
    if why := unknown(processor):
        return why
    if not watch.unpermuted:
        return "the frames are no arrays of uint8 (F, H, W, 3)"
    devices = {video.device for video in videos}
    if len(devices) > 1:
        return "the frames are on several devices"
    if why := why_not_on(*devices):
        return why
    if kwargs.get("return_tensors") != "pt":
        return f"return_tensors is {kwargs.get('return_tensors')!r}"
    resample = getattr(kwargs["resample"], "value", kwargs["resample"])
    if resample not in BICUBIC:
        return f"resample is {kwargs['resample']!r}"
    return ""


def _why_not_squares(out: Mapping[str, Any], kwargs: Mapping[str, Any], watch: Watch) -> str:
    """Why whole frames are not those of the model, squashed, or ""."""
    pixels = out.get(PIXELS)
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 5:
        return "it gives no tensor of whole frames"
    if watch.squares is None:
        return "what the model's frames are is not known"
    if kwargs.get("do_center_crop"):
        return "frames are cropped"
    if tuple(pixels.shape[3:]) != (watch.squares.pixels,) * 2:
        return f"frames become {pixels.shape[3]} x {pixels.shape[4]} pixels"
    return ""


@cache
def why_not_on(device: torch.device) -> str:
    """Tries the kernels that make pixels on a device, once.

    A processor resizes frames on a GPU in float32, and rounds. What is made here is what it makes of them on a CPU, so
    that all engines of a deployment see the same pixels wherever they were decoded.

    Args:
        device: Where frames are.

    Returns:
        Why pixels cannot be made there, or "".
    """
    if device.type == "cpu":  # `why_not` has seen to it
        return ""
    if device.type != "cuda":
        return f"the frames are on {device.type}"
    try:
        return "" if _same_on(device) else f"{torch.cuda.get_device_name(device)} makes other pixels than a CPU"
    except Exception as error:  # no compiler, an architecture that Triton does not know
        return f"{device} cannot be tried ({type(error).__name__}: {error})"


def _same_on(device: torch.device) -> bool:
    """Whether a device makes the same pictures, rows and pixels as the CPU of frames that are shrunk and enlarged."""
    rng = np.random.default_rng(0)
    levels = torch.from_numpy(rng.normal(size=(3, 256)).astype(np.float32))
    for frames, height, width in ((5, 61, 83), (2, 150, 211)):
        here = torch.from_numpy(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))
        tokens = torch.from_numpy(np.flatnonzero(rng.random(-(-frames // 2) * 6) < 0.7))
        made = []
        for video in (here, here.to(device)):
            rows = evs_kernels.resize_patches(video, 56, 84, tokens, 2, 14)
            pixels = evs_kernels.place_blocks(rows[:, : 3 * 28**2].contiguous(), levels.to(video.device), 2, 3)
            made.append([evs_kernels.pool_frames(video, 8, 12, 2), rows, pixels])
        if not all(torch.equal(one, other.cpu()) for one, other in zip(*made, strict=True)):
            return False
    return True


_tried: MutableMapping[Any, dict[Any, str]] = WeakKeyDictionary()
"""Answers of `why_not` by processor; of each, by its class and the squares."""


def why_not(video_processor: Any, squares: Squares | None = None) -> str:
    """Tries a watched processor on a few small videos, each object once: vLLM makes what asks here for every request.

    Args:
        video_processor: The processor.
        squares: As for `watching`.

    Returns:
        Why its pixels cannot be made without it on this installation, or "".
    """
    known, case = _tried.setdefault(video_processor, {}), (type(video_processor), squares)
    if case not in known:
        known[case] = _try(video_processor, squares)
    return known[case]


def _try(video_processor: Any, squares: Squares | None) -> str:
    if why := unknown(video_processor):
        return why
    try:
        return _differs(video_processor, squares)
    except Exception as error:  # whatever it does not take: the videos of requests may be of another kind
        return f"it cannot be tried ({type(error).__name__}: {error})"


def _made(processor: Any, video: np.ndarray) -> Mapping[str, torch.Tensor]:
    """What a processor makes of a video."""
    if hasattr(processor, "preprocess_multidata"):
        pixels, placeholders, grid = processor.preprocess_multidata(video=video)
        return {PIXELS: pixels, "placeholders": torch.tensor(placeholders), GRID: grid}
    made: Mapping[str, torch.Tensor] = processor(videos=[video], do_sample_frames=False, return_tensors="pt")
    return made


def _differs(video_processor: Any, squares: Squares | None) -> str:
    rng = np.random.default_rng(0)
    for frames, height, width in ((5, 61, 83), (4, 150, 211), (2, 60, 84)):
        video = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        video //= 1 + video[:, :, :1] % 4  # of all contrasts
        stock = _made(video_processor, video)
        with watching(leave_rows=True, squares=squares) as watch:
            own = _made(video_processor, video)
        (seen,) = watch.seen
        if seen.why_stock:
            return seen.why_stock
        (name,) = (name for name in stock if name.startswith("pixel_values"))
        same = own.keys() == stock.keys() and all(torch.equal(own[key], stock[key]) for key in own if key != name)
        made = seen.rows(None, stock[name].dtype)
        if not same or not torch.equal(made.flatten(), stock[name].flatten()):
            return "it gives other pixels here than it gave to this package's tests"
    return ""
