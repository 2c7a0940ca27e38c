# SPDX-License-Identifier: Apache-2.0
"""`evs-vllm plan` and `view` on a real video and a tiny model: the same plan as the server's processor makes."""

import json

import numpy as np
import pytest

from evs_vllm.cli import main
from evs_vllm.cli.plan import BAR_WIDTH, lines
from evs_vllm.families import family_of
from evs_vllm.options import SELECTION_NAMES
from evs_vllm.testing import real_clip_path
from tests.cli.clips import inspected


@pytest.fixture
def clip_and_model(model_dir, monkeypatch):
    """The words that name a real video and a tiny model."""
    from evs_vllm.engine import plugin

    monkeypatch.setattr(plugin, "_server_config", None)  # and put back afterwards
    return [str(real_clip_path("bikes")), "--model", str(model_dir("qwen2_5_vl"))]


def test_the_table():
    clip = inspected(units=7, rate=0.6)
    text = lines(clip)
    assert text[0].startswith("drawn & <cut>.mp4: 14 frames of 140x84 as Qwen2.5-VL sees them, 7 units of 3x5 = 15")
    assert text[1] == "EVS drops 60 % of the video tokens of each clip (selection learned, keep positions)"
    rows = text[4:11]
    assert [row.split()[:4] for row in rows] == [
        [str(unit), f"{unit / 2:.2f}", "15", str(count)] for unit, count in enumerate(clip.plan.counts)
    ]
    assert rows[0].endswith("█" * BAR_WIDTH)
    assert text[11].split() == ["total", "105", "42", "60.0", "%", "dropped"]
    assert text[-1].startswith("time    decode 10.0 ms, HF processor 10.0 ms")


def test_a_short_clip_is_said_to_be_one():
    """At 0.9, 6 units of 15 tokens have 9, which unit 0 makes 15, and half of the others' share is 3.75."""
    clip = inspected(rate=0.9)
    assert lines(clip)[2] == (
        "short clip: unit 0 whole and at least half of the share of the others: 19 tokens, where --video-pruning-rate "
        "would keep 15"
    )
    report = clip.to_mapping()
    assert report["short_clip"] and (report["tokens_kept"], report["video_pruning_rate_keeps"]) == (19, 15)
    assert ", cut to 17 at most: 17 tokens, where" in lines(inspected(rate=0.9, max_tokens=17))[2]


@pytest.mark.parametrize(
    ("options", "stock"),
    [
        ({"rate": 0.9, "selection": "paper"}, 15),
        ({"rate": 0.9, "min_tokens_per_unit": 4}, 15),
        ({"rate": 0.9, "max_tokens": 15}, 15),
        ({"rate": 0.5}, 45),
        ({"rate": 0}, None),
        ({"threshold": 30}, None),
        ({"max_tokens": 19}, None),
    ],
    ids=str,
)
def test_what_keeps_no_more_for_being_short(options, stock):
    clip = inspected(**options)
    assert lines(clip)[2] == "" and not any(line.startswith("short clip") for line in lines(clip))
    report = clip.to_mapping()
    assert not report["short_clip"] and report["video_pruning_rate_keeps"] == stock
    assert report["config"]["selection"] == options.get("selection", "learned")


def test_the_table_when_off():
    text = lines(inspected(rate=0, seconds=False))
    assert text[1] == "EVS is off" and "0.0 % dropped" in text[10]


@pytest.mark.vllm
@pytest.mark.parametrize("selection", SELECTION_NAMES)
def test_json_is_the_plan_of_the_processor(clip_and_model, capfd, selection):
    """The processor is asked again here, in the words of vLLM."""
    assert main(["plan", *clip_and_model, "--rate", "0.7", "--selection", selection, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["kept"] == server_plan(clip_and_model, {"rate": 0.7, "selection": selection}).kept.tolist()
    assert report["tokens_kept"] == len(report["kept"]) == sum(report["counts"]) == int(report["tokens"] * 3 / 10)
    assert np.prod(report["grid"]) == report["tokens"] == report["prompt_tokens"]["before"]
    assert report["prompt_tokens"]["after"] == report["tokens_kept"]
    assert report["frames"]["count"] == 20 and report["unit_seconds"][:2] == [0, 1.0]
    assert all(report["seconds"][stage] > 0 for stage in ("decode", "HF processor", "score", "layout", "pixels"))


def server_plan(words, options):
    """The plan in the fields that an engine would get for the same file."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from evs_vllm.engine.plan_field import plan_of

    video, model = words[0], words[2]
    config = EngineArgs(model=model, additional_config={"evs": options}).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    with open(video, "rb") as file:
        frames = VIDEO_LOADER_REGISTRY.load("qwen2_vl").load_bytes(file.read())
    prompt = processor.info.get_tokenizer().encode("<|vision_start|><|video_pad|><|vision_end|>")
    out = processor(prompt, mm_items=processor.info.parse_mm_data({"video": [frames]}))
    return plan_of(out["mm_kwargs"]["video"][0])


@pytest.mark.vllm
def test_frame_options_reach_the_loader(clip_and_model, capfd):
    assert main(["plan", *clip_and_model, "--fps", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["frames"]["count"] == 10 and report["unit_seconds"][1] == 2


@pytest.mark.vllm
def test_rate_0_keeps_everything(clip_and_model, capfd):
    assert main(["plan", *clip_and_model, "--rate", "0", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["kept"] == list(range(report["tokens"])) and report["dropped_share"] == 0


@pytest.mark.vllm
def test_what_vllm_cannot_read_is_one_line(clip_and_model, capfd, tmp_path):
    (broken := tmp_path / "broken clip.mp4").write_bytes(b"no video")
    assert main(["plan", str(broken), *clip_and_model[1:]]) == 2
    assert (error := capfd.readouterr().err.splitlines()[-1]).startswith("evs-vllm plan: error: vLLM cannot decode")
    assert "Traceback" not in error


@pytest.mark.vllm
def test_an_unsupported_architecture_is_named(clip_and_model, capfd, monkeypatch):
    from evs_vllm.engine import plugin

    monkeypatch.setattr(plugin, "family_of", lambda architecture: None)
    assert family_of("Qwen2_5_VLForConditionalGeneration") is not None
    assert main(["plan", *clip_and_model]) == 2
    assert "EVS does not support Qwen2_5_VLForConditionalGeneration" in capfd.readouterr().err


@pytest.mark.vllm
def test_view_shows_the_frames_as_they_went_in(clip_and_model, capfd, tmp_path):
    """Frames put together from the processor's patches resemble the video's, resized."""
    from PIL import Image

    from evs_vllm.config import EVSConfig
    from evs_vllm.engine.inspect import inspect_clip
    from evs_vllm.testing import real_clip_frames

    for name in ("out.png", "out.html"):
        assert main(["view", *clip_and_model, "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 20_000
    clip = inspect_clip(real_clip_path("bikes"), clip_and_model[2], EVSConfig(rate=0.5))
    height, width = clip.frames.shape[1:3]
    first = Image.fromarray(real_clip_frames("bikes", frames=1)[0]).resize((width, height), Image.Resampling.BICUBIC)
    difference = np.abs(clip.frames[0].astype(int) - np.asarray(first).astype(int))
    assert difference.mean() < 2, difference.mean()
