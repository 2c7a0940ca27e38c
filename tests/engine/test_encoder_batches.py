# SPDX-License-Identifier: Apache-2.0
"""What the mixin of a model class does around the stock encoder, with a fake in its place."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import Layout
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import PlanError
from evs_vllm.families import FAMILIES
from evs_vllm.fingerprint import fingerprint

pytestmark = pytest.mark.vllm


@dataclass
class GraphConfig:
    modalities: list[str]


class FakeStock:
    """What the mixin calls of a vLLM model class."""

    _processor_factory: Any = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.calls: list[tuple[int, ...]] = []
        self.visual = SimpleNamespace(blocks=[])

    def embed_multimodal(self, *, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor) -> Any:
        self.calls.append(tuple(video_grid_thw.prod(-1).tolist()))
        return torch.split(pixel_values_videos[::4], (video_grid_thw.prod(-1) // 4).tolist())

    def named_children(self) -> tuple[()]:
        return ()

    def get_encoder_cudagraph_config(self) -> GraphConfig:
        return GraphConfig(["image", "video"])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    from evs_vllm.engine import model
    from evs_vllm.engine.attached import attach_settings
    from evs_vllm.engine.factory import ProcessorFactory

    @dataclass
    class Factories:
        processor: Any

    stock = type("Fake", (FakeStock,), {"_processor_factory": Factories(processor=object)})
    cls = model.model_class(stock, FAMILIES[0])
    assert isinstance(cls._processor_factory.processor, ProcessorFactory)  # type: ignore[attr-defined]
    model_config = SimpleNamespace(multimodal_config=SimpleNamespace(), hf_config=SimpleNamespace())
    attach_settings(model_config, EVSConfig(rate=0.5), fingerprint(EVSConfig(rate=0.5)))
    scheduler = SimpleNamespace(max_num_encoder_input_tokens=30)
    config = SimpleNamespace(additional_config={"evs": {}}, model_config=model_config, scheduler_config=scheduler)
    return cls(vllm_config=config)


def test_video_leaves_the_encoder_graph(fake: Any) -> None:
    assert fake.get_encoder_cudagraph_config().modalities == ["image"]


def test_a_plan_for_a_tower_that_reuses_is_refused_where_none_does(fake: Any) -> None:
    tokens = torch.from_numpy(np.random.default_rng().integers(0, 255, (3, 4, 5), dtype=np.uint8))
    plan = make_plan(
        Clip(tokens, (3, 2, 2)), EVSConfig(rate=0.5, selection="paper", encoder="reuse", encoder_refresh=0)
    )
    array = torch.from_numpy(plan.with_layout(Layout.contiguous(1, plan.num_tokens), plan.num_tokens).to_array())
    assert plan.encoder == "reuse"
    fake._evs_tower = None
    rows = torch.zeros(4 * len(plan.computed), 1)
    with pytest.raises(PlanError, match="which this worker cannot do.*same options"):
        fake.embed_multimodal(pixel_values_videos=rows, video_grid_thw=torch.tensor([(3, 4, 4)]), evs_plan=[array])


def test_rows_that_do_not_fit_the_plan_are_refused(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStock, "embed_multimodal", lambda self, **kwargs: [torch.zeros(11, 1)])
    plan = make_plan(Clip(torch.zeros(3, 4, 5, dtype=torch.uint8), (3, 2, 2)), EVSConfig(rate=0.5, selection="paper"))
    array = torch.from_numpy(plan.with_layout(Layout.contiguous(1, plan.num_tokens), plan.num_tokens).to_array())
    with pytest.raises(PlanError, match=r"returned \(11, 1\) for a clip laid out for 12 rows"):
        fake.embed_multimodal(
            pixel_values_videos=torch.zeros(48, 1), video_grid_thw=torch.tensor([(3, 4, 4)]), evs_plan=[array]
        )


def test_clips_are_encoded_in_bounded_batches_and_gathered(fake: Any) -> None:
    grids = [(3, 4, 4), (2, 4, 4), (4, 4, 4), (10, 4, 4), (1, 4, 4)]  # 12, 8, 16, 40, 4 tokens
    rows = torch.arange(sum(t * h * w for t, h, w in grids))[:, None].float()
    plans, start, expected = [], 0, []
    rng = np.random.default_rng()
    for t, h, w in grids:
        tokens = torch.from_numpy(rng.integers(0, 3, (t, h * w // 4, 5), dtype=np.uint8))
        plan = make_plan(Clip(tokens, (t, h // 2, w // 2)), EVSConfig(rate=0.5, selection="paper"))
        plans.append(plan.with_layout(Layout.contiguous(1, plan.num_tokens), plan.num_tokens))
        expected.append((start + 4 * plan.kept).tolist())
        start += t * h * w
    arrays = [torch.from_numpy(plan.to_array()) for plan in plans]
    out = fake.embed_multimodal(pixel_values_videos=rows, video_grid_thw=torch.tensor(grids), evs_plan=arrays)
    assert [embeds[:, 0].long().tolist() for embeds in out] == expected
    assert fake.calls == [(48, 32), (64,), (160,), (16,)], "at most 30 tokens together, a larger clip alone"
    fake.calls.clear()
    (whole,) = fake.embed_multimodal(pixel_values_videos=rows[:48], video_grid_thw=torch.tensor(grids[:1]))
    assert len(whole) == 12, "without a plan nothing is dropped"
