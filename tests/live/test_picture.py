# SPDX-License-Identifier: Apache-2.0
"""The picture of a session: the plans that the server's own processor makes of the videos of one request."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from evs_vllm.cli import main
from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.errors import EVSError
from evs_vllm.testing import real_clip_path, synthetic_clip
from tests.live.fakes import FakeVLLM

pytestmark = pytest.mark.vllm

RATE = EVSConfig(rate=0.75)


@pytest.fixture
def model(model_dir, monkeypatch):
    from evs_vllm.engine import plugin

    monkeypatch.setattr(plugin, "_server_config", None)  # and put back afterwards
    return str(model_dir("qwen2_5_vl"))


def chunk(frames, size=(112, 140), **options):
    """A drawn chunk as a URL, and the frames that are in it."""
    parts, decoded = [], []
    for frame in synthetic_clip(frames, size, **options):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=90)
        parts.append(base64.b64encode(buffer.getvalue()).decode())
        decoded.append(np.asarray(Image.open(buffer)))
    return "data:video/jpeg;base64," + ",".join(parts), np.stack(decoded)


def test_several_videos_are_shown_as_one(model):
    from evs_vllm.engine.inspect import inspect_stream

    clips = [chunk(frames, noise=2, seed=frames) for frames in (8, 34, 2, 6)]
    starts = [0.0, 4.0, 30.0, 31.0]
    chunks = [(url, start) for (url, _), start in zip(clips, starts)]
    whole = inspect_stream(chunks, 2.0, model, RATE, {}, "cam")
    assert whole.plan.grid == (25, 4, 5) and whole.frames_per_unit == 2
    assert (whole.frames == np.concatenate([frames for _, frames in clips])).all(), "more than 32 frames, too"
    assert whole.unit_seconds == (*range(4), *range(4, 21), 30, *range(31, 34))
    masks = [inspect_stream([one], 2.0, model, RATE, {}, "cam").plan.mask for one in chunks]
    assert (whole.plan.mask == np.concatenate(masks)).all()
    assert not whole.plan.mask.all()
    more = inspect_stream(chunks, 2.0, model, RATE, {"evs_rate": 0.5}, "cam")
    assert more.plan.num_kept > whole.plan.num_kept


def test_plans_are_joined_token_by_token():
    from evs_vllm.engine.inspect import joined

    rng = np.random.default_rng(5)
    for _ in range(100):
        units = rng.integers(1, 5, size=rng.integers(1, 5))
        plans = []
        for count in units:
            mask = rng.random(count * 6) < rng.random()
            mask[rng.integers(len(mask))] = True
            plans.append(RetentionPlan((int(count), 2, 3), np.flatnonzero(mask)))
        assert (joined(plans).mask == np.concatenate([plan.mask for plan in plans])).all()


def test_videos_of_several_sizes_are_refused(model):
    from evs_vllm.engine.inspect import inspect_stream

    chunks = [(chunk(4)[0], 0.0), (chunk(4, size=(140, 112))[0], 2.0)]
    with pytest.raises(EVSError, match="several sizes"):
        inspect_stream(chunks, 2.0, model, RATE, {}, "cam")


def test_the_command_draws_at_the_end(model, tmp_path, capsys, monkeypatch):
    # Without the server's side of streams there is no such key; the picture is that of chunks on their own.
    monkeypatch.setattr("evs_vllm.cli.live.request_keys", lambda args: {})
    picture = tmp_path / "kept.png"
    words = ["--fast", "--keep-seconds", "8", "--max-side", "140", "--picture", str(picture), "--model", model]
    with FakeVLLM(max_model_len=10**6) as server:
        assert main(["live", str(real_clip_path("bikes")), "--server", server.url, *words, "--rate", "0.5"]) == 0
    err = capsys.readouterr().err
    assert f"wrote {picture}" in err and "bikes.mp4: " in err
    assert Image.open(picture).size[0] == 1680


def test_what_cannot_be_drawn_is_said_and_no_error(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evs_vllm.cli.live.request_keys", lambda args: {"evs_nothing": 1})
    picture = tmp_path / "kept.png"
    with FakeVLLM(max_model_len=10**6) as server:
        words = ["--server", server.url, "--fast", "--picture", str(picture), "--model", model]
        assert main(["live", str(real_clip_path("bikes")), *words]) == 0
    assert "no picture: Unknown key(s)" in capsys.readouterr().err and not picture.exists()
