# SPDX-License-Identifier: Apache-2.0
"""Video processors that are watched but not of the kind that is known: they work as they did."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.errors import RequestError
from evs_vllm.families import front_end


class Unknown:
    """As transformers' video processors call their parts."""

    def preprocess(self, videos: Any, **kwargs: Any) -> Any:
        return self._preprocess(videos=self._prepare_input_videos(videos=videos, input_data_format=None), **kwargs)

    def _prepare_input_videos(self, videos: Any, input_data_format: Any) -> Any:
        return [
            torch.from_numpy(v).permute(0, 3, 1, 2).contiguous() if isinstance(v, np.ndarray) else v for v in videos
        ]

    def _preprocess(self, videos: Any, **kwargs: Any) -> Any:
        self.contiguous = [video.is_contiguous() for video in videos]
        grids = {front_end.GRID: [[kwargs["units"], 2, 2]]} if "units" in kwargs else {}
        return {"pixels": torch.stack(videos), **grids}


VIDEO = np.arange(4 * 6 * 8 * 3, dtype=np.uint8).reshape(4, 6, 8, 3)
SIZES = {"temporal_patch_size": 2, "patch_size": 2, "merge_size": 2}


@pytest.mark.parametrize("kwargs", [{}, {"units": 2}, SIZES, {**SIZES, "units": 3}])
def test_what_we_know_nothing_of_has_no_source(kwargs: dict[str, int]) -> None:
    processor = Unknown()
    plain = processor.preprocess([VIDEO], **kwargs)
    front_end.watch_processor(processor, with_cells=True)
    with front_end.watching(leave_rows=True) as watch:
        out = processor.preprocess([VIDEO], **kwargs)
    assert out.keys() == plain.keys() and torch.equal(out["pixels"], plain["pixels"])
    assert processor.contiguous == [True], "its own code sees what it always saw"
    assert all(seen.source is None and "pixels" in seen.why_stock for seen in watch.seen)
    assert "Unknown" in front_end.why_not(processor)


def test_a_source_is_seen_whoever_makes_the_pixels() -> None:
    processor = Unknown()
    front_end.watch_processor(processor)
    front_end.watch_processor(processor, with_cells=True)  # may be asked for later
    with front_end.watching() as watch:
        out = processor.preprocess([VIDEO], **SIZES, units=2)
    (seen,) = watch.seen
    assert seen.source is not None and seen.source.frames.tolist() == VIDEO.tolist()
    (source,) = front_end.sources_of_cells(out[front_end.CELLS], [(2, 1, 1)])
    means = VIDEO.reshape(2, 2, *VIDEO.shape[1:]).astype(float)
    assert source.frames.shape == (2, 4, 4, 3)
    assert abs(source.frames.double().mean() - means.mean()) < 1
    front_end.unwatch_processor(processor)
    assert type(processor) is Unknown


def test_cells_of_another_clip_are_refused() -> None:
    for cells, grid in ((torch.zeros(16, 3), (1, 1, 1)), (torch.zeros(16, 3, dtype=torch.uint8), (1, 1, 2))):
        with pytest.raises(RequestError, match="evs_cells"):
            front_end.sources_of_cells(cells, [grid])


def test_other_objects_are_left_alone() -> None:
    other = SimpleNamespace()
    front_end.unwatch_processor(other)
    assert type(other) is SimpleNamespace
