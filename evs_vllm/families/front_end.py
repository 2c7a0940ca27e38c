# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to pixel rows: what a video processor of transformers is given, and its rows without its work.

A processor that is `watched` notes the frames of every video before it resizes them; clips are judged by those. Of the
processors in `PROVEN` it can also leave out the pixel rows, which are then made of the tokens alone that a vision tower
computes (`Seen.rows`). All else that the processor returns, grids among it, still comes from its own code: it runs on
tensors without data. Both happen within `watching` only; outside of it a watched processor does what it always did.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

import evs_kernels
from evs_vllm.core.clip import Source
from evs_vllm.errors import RequestError
from evs_vllm.families.qwen2_vl import GRID, PIXELS

CELLS = "evs_cells"
"""The field in which a watched processor hands on the low-resolution pictures of its clips."""

CELLS_PER_TOKEN = 4
"""Cells along one side of a token in that field: what `evs_vllm.core.descriptors` looks at."""

PROVEN = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor", "Glm46VVideoProcessor")
"""Classes of transformers whose pixel rows `evs_kernels.resize_patches` makes: resized bicubically with antialiasing,
then cut into patches in the order of Qwen2-VL. Tests compare each with it, and `why_not` does where it is installed."""

_BICUBIC = 3  # PIL's number
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Seen:
    """A video as its processor got it.

    Attributes:
        source: Its frames, or None if they are no uint8 pixels of three colours.
        grid: (T, rows, columns) in patches.
        patch, merge: Pixels along a side of a patch, patches along a side of a token.
        why_stock: Why the processor made the pixel rows itself, or "" if it left them to `rows`.
        levels: What each of the 256 values of the three colours becomes, (3, 256), where rows are normalised.
    """

    source: Source | None
    grid: tuple[int, int, int]
    patch: int
    merge: int
    why_stock: str
    levels: torch.Tensor | None = None

    def blank(self, dtype: torch.dtype) -> torch.Tensor:
        """The pixel rows of all tokens without data."""
        assert self.source is not None
        values = 3 * self.source.unit_frames * self.patch**2
        return torch.empty(int(np.prod(self.grid)), values, dtype=dtype, device="meta")

    def rows(self, tokens: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor:
        """The pixel rows of some tokens, bit for bit those of the processor.

        Args:
            tokens: (K,) sorted flat indices ``t*P + p``; None for all.
            dtype: That of the rows.

        Returns:
            (K * merge**2, values of a patch), on the device of the frames.
        """
        source = self.source
        assert source is not None
        _, height, width = self.grid
        pixels = evs_kernels.resize_patches(
            source.frames,
            height * self.patch,
            width * self.patch,
            None if tokens is None else torch.from_numpy(np.ascontiguousarray(tokens)),
            self.merge,
            self.patch,
            unit_frames=source.unit_frames,
        )
        rows = pixels.view(len(pixels) * self.merge**2, -1)
        return rows if self.levels is None else _levelled(rows, self.levels.to(dtype))


def _levelled(rows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """uint8 `rows`, colours outermost, with every value replaced by its level."""
    out = torch.empty(rows.shape, dtype=levels.dtype)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE].view(-1, len(levels), rows.shape[1] // len(levels))
        here = out[start : start + _ROWS_AT_ONCE].view(some.shape)
        for colour, level in enumerate(levels):
            here[:, colour] = level[some[:, colour].int()]
    return out


@dataclass
class Watch:
    """What `watching` has seen.

    Attributes:
        leave_rows: Whether processors may leave out pixel rows.
        seen: The videos in the order in which they were processed.
    """

    leave_rows: bool
    seen: list[Seen] = field(default_factory=list)
    unpermuted: bool = False
    """Whether the frames of the call that is running are views, which its processor would have copied."""


_watch: ContextVar[Watch | None] = ContextVar("evs_watch", default=None)


@contextmanager
def watching(leave_rows: bool = False) -> Iterator[Watch]:
    """Notes what watched processors are given in this context.

    Args:
        leave_rows: Whether processors that are proven equal leave out their pixel rows: the field then has the right
            number of rows and no columns.
    """
    outer, watch = _watch.get(), Watch(leave_rows)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
        if outer is not None:
            outer.seen += watch.seen


class _Watched:
    """Goes before a video processor's class."""

    _evs_with_cells = False

    def preprocess(self: Any, videos: Any, **kwargs: Any) -> Any:
        if not self._evs_with_cells:
            return super().preprocess(videos, **kwargs)  # type: ignore[misc]
        with watching() as watch:
            out = super().preprocess(videos, **kwargs)  # type: ignore[misc]
        if watch.seen and all(seen.source is not None for seen in watch.seen):
            out[CELLS] = torch.cat([cells_of(seen) for seen in watch.seen])
        return out

    def _prepare_input_videos(self: Any, videos: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is not None:
            watch.unpermuted = kwargs.get("input_data_format") is None and all(map(_colours_last, videos))
            if watch.unpermuted:
                # Saves the copy with colours first.
                videos = [torch.from_numpy(video).permute(0, 3, 1, 2) for video in videos]
        return super()._prepare_input_videos(videos, *args, **kwargs)  # type: ignore[misc]

    def _preprocess(self: Any, videos: Sequence[torch.Tensor], **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is None:
            return super()._preprocess(videos, **kwargs)  # type: ignore[misc]
        why = _why_stock(self, videos, kwargs, watch) if watch.leave_rows else "pixels are wanted"
        if why:
            whole = [video.contiguous() for video in videos] if watch.unpermuted else videos
            out = super()._preprocess(whole, **kwargs)  # type: ignore[misc]
        else:
            bare = [torch.empty(video.shape, dtype=video.dtype, device="meta") for video in videos]
            out = super()._preprocess(bare, **kwargs)  # type: ignore[misc]
            out[PIXELS] = torch.empty(len(out[PIXELS]), 0, dtype=out[PIXELS].dtype)
        sizes: list[Any] = [kwargs.get(name) for name in ("temporal_patch_size", "patch_size", "merge_size")]
        if GRID not in out or None in sizes:
            return out  # a processor that we know nothing of
        levels = None if why or not out[PIXELS].is_floating_point() else _levels(self, kwargs)
        for video, grid in zip(videos, out[GRID], strict=True):
            shape = int(grid[0]), int(grid[1]), int(grid[2])
            watch.seen.append(Seen(_source_of(video, sizes[0], shape[0]), shape, sizes[1], sizes[2], why, levels))
        return out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _rebuild, (_stock_of(type(self)), self._evs_with_cells, self.__dict__)


def _rebuild(stock: Any, with_cells: bool, attributes: Mapping[str, Any]) -> Any:
    processor = stock.__new__(_class(stock, with_cells))
    processor.__dict__.update(attributes)
    return processor


@cache
def _class(stock: Any, with_cells: bool) -> type:
    # Named as it was: processors are saved by the names of their classes.
    own = {"_evs_with_cells": with_cells, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (_Watched, stock), own)


def watch_processor(video_processor: Any, with_cells: bool = False) -> None:
    """Makes a video processor of transformers one that `watching` sees; twice is once.

    Args:
        video_processor: Its class is replaced by a subclass of the same name.
        with_cells: Whether it also hands on the low-resolution pictures of its clips, as the field `CELLS` of what it
            returns: `cells_of` each, one after the other. It has no such field for videos without a source.
    """
    stock: Any = _stock_of(type(video_processor))
    video_processor.__class__ = _class(stock, with_cells or getattr(video_processor, "_evs_with_cells", False))


def unwatch_processor(video_processor: Any) -> None:
    """Undoes `watch_processor`; other processors stay as they are."""
    if isinstance(video_processor, _Watched):
        video_processor.__class__ = _stock_of(type(video_processor))


def _stock_of(cls: type) -> type:
    """The class that a watched one stands for; others are their own."""
    return next(base for base in cls.__mro__ if not issubclass(base, _Watched))


def _source_of(video: torch.Tensor, unit_frames: int, units: int) -> Source | None:
    """The frames of a video, (F, 3, height, width), of which the processor made so many units."""
    if video.dtype != torch.uint8 or video.shape[1] != 3 or -(-len(video) // unit_frames) != units:
        return None
    return Source(video.permute(0, 2, 3, 1).contiguous(), unit_frames)


def cells_of(seen: Seen) -> torch.Tensor:
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
    return (
        isinstance(video, np.ndarray)
        and video.ndim == 4
        and video.dtype == np.uint8
        and (video.shape[3] == 3 and video.shape[1] not in (1, 3) and video.flags.c_contiguous)
    )


def _unknown(processor: Any) -> str:
    name = _stock_of(type(processor)).__name__
    return "" if name in PROVEN else f"what {name} does with pixels is not known"


def _why_stock(processor: Any, videos: Sequence[torch.Tensor], kwargs: Mapping[str, Any], watch: Watch) -> str:
    """Why the rows of these videos are not proven equal, or ""."""
    if why := _unknown(processor):
        return why
    if any(video.device.type != "cpu" for video in videos):
        return "the frames are on a GPU"
    if not watch.unpermuted:
        return "the frames are no arrays of uint8 (F, H, W, 3)"
    if kwargs.get("return_tensors") != "pt":
        return f"return_tensors is {kwargs.get('return_tensors')!r}"
    resample = getattr(kwargs["resample"], "value", kwargs["resample"])
    if resample not in (_BICUBIC, "bicubic"):
        return f"resample is {kwargs['resample']!r}"
    return ""


def _levels(processor: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the processor's own arithmetic makes of every value of every colour: (3, 256)."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 1, 3, 1, 256).contiguous()
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    levels: torch.Tensor = processor.rescale_and_normalize(values, *(kwargs[name] for name in names))
    return levels.view(3, 256)


_tried: MutableMapping[Any, str] = WeakKeyDictionary()


def why_not(video_processor: Any) -> str:
    """Tries a watched processor on a few small videos, each object once: vLLM makes what asks here for every request.

    Returns:
        Why its pixel rows cannot be made without it on this installation, or "".
    """
    if video_processor not in _tried:
        _tried[video_processor] = _try(video_processor)
    return _tried[video_processor]


def _try(video_processor: Any) -> str:
    if why := _unknown(video_processor):
        return why
    try:
        return _differs(video_processor)
    except Exception as error:  # whatever it does not take: the videos of requests may be of another kind
        return f"it cannot be tried ({type(error).__name__}: {error})"


def _differs(video_processor: Any) -> str:
    rng = np.random.default_rng(0)
    for frames, height, width in ((5, 61, 83), (4, 150, 211), (2, 84, 36)):
        video = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        video //= 1 + video[:, :, :1] % 4  # of all contrasts
        stock = video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        with watching(leave_rows=True) as watch:
            own = video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        (seen,) = watch.seen
        if seen.why_stock:
            return seen.why_stock
        rows = stock[PIXELS]
        if not torch.equal(own[GRID], stock[GRID]) or not torch.equal(seen.rows(None, rows.dtype), rows):
            return "it gives other pixels here than it gave to this package's tests"
    return ""
