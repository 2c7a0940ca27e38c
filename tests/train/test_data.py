# SPDX-License-Identifier: Apache-2.0
"""The data format, and what the collator makes of it."""

import json

import numpy as np
import pytest
import torch

from evs_vllm.testing import real_clip_path
from evs_vllm.train.data import ChatCollator, ChatDataset, DataError, DrawnDataset, FrameSettings, load_video
from evs_vllm.train.synthetic import SceneSettings, make_example, write_dataset

SMALL = SceneSettings(units=5)


@pytest.fixture
def processor(reference):
    return reference("qwen2_5_vl").processor


def answers_of(processor, batch):
    return [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]


@pytest.mark.parametrize("container", ["npy", "mp4"])
def test_jsonl_round_trip(processor, tmp_path, container):
    settings = SceneSettings(units=6, strides=(1, 2))
    path = write_dataset(tmp_path, 4, settings, seed=2, container=container)
    data, drawn = ChatDataset(path), DrawnDataset(settings, 4, seed=2)
    collate = ChatCollator(processor)
    batch, expected = collate([data[i] for i in range(4)]), collate([drawn[i] for i in range(4)])
    assert answers_of(processor, batch) == [make_example(settings, [2, i]).answer + "<|im_end|>" for i in range(4)]
    assert len({len(row[mask > 0]) for row, mask in zip(batch["input_ids"], batch["attention_mask"])}) > 1, "no padding"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    for name in ("input_ids", "labels", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(batch[name], expected[name]), name
    assert set(batch["second_per_grid_ts"].tolist()) == {1.0, 2.0}
    difference = (batch["pixel_values_videos"] - expected["pixel_values_videos"]).abs().mean()
    assert difference == 0 if container == "npy" else 0 < difference < 0.5


def test_both_chat_forms_and_images(processor, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((56, 56, 3), 80, np.uint8)).save(tmp_path / "i.png")
    np.save(tmp_path / "v.npy", make_example(SMALL, 0).frames)
    llava = {
        "video": ["v.npy", "v.npy"],
        "image": "i.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<video>\nCompare with <video> and <image>."},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Because"},
        ],
    }
    video, image = {"type": "video", "video": "v.npy"}, {"type": "image", "image": "i.png"}
    openai = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    video,
                    {"type": "text", "text": "Compare with "},
                    video,
                    {"type": "text", "text": " and "},
                    image,
                    {"type": "text", "text": "."},
                ],
            },
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because"},
        ]
    }
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(llava) + "\n\n" + json.dumps(openai) + "\n")
    data = ChatDataset(path)
    assert len(data) == 2
    batch = ChatCollator(processor)([data[0], data[1]])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert answers_of(processor, batch) == ["yes<|im_end|>Because<|im_end|>"] * 2
    assert len(batch["video_grid_thw"]) == 4 and len(batch["image_grid_thw"]) == 2
    with pytest.raises(DataError, match="max_length"):
        ChatCollator(processor, max_length=20)([data[0]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "JSON object"),
        ("{}", "neither 'messages'"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "no turn of the assistant"),
        ('{"messages": [{"role": "robot", "content": "?"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": [{"type": "sound"}]}]}', "unknown part"),
        ('{"conversations": [{"from": "human", "value": "<video>?"}]}', "more <video>"),
        ('{"video": "a", "conversations": [{"from": "gpt", "value": "yes"}]}', "than tags"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    good = '{"messages": [{"role": "assistant", "content": "yes"}]}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message) as error:
        ChatDataset(path)
    assert "line 2" in str(error.value)


def test_frames_of_a_real_video(tmp_path):
    video = load_video(real_clip_path("bikes"), FrameSettings(fps=2, max_frames=8))
    assert len(video.frames) == len(video.indices) <= 8 and video.indices[-1] == video.total - 1
    assert video.frames.dtype == np.uint8 and len({f.tobytes() for f in video.frames}) == len(video.frames)
    assert FrameSettings(fps=1, max_frames=100).pick(total=100, fps=10) == np.linspace(0, 99, 10).round().tolist()
    (tmp_path / "x.mp4").write_bytes(b"no video")
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    for name, message in (("x.mp4", "decoded"), ("x.npy", "expected uint8"), ("y.mp4", "no such video")):
        with pytest.raises(DataError, match=message):
            load_video(tmp_path / name, FrameSettings())
