# SPDX-License-Identifier: Apache-2.0
"""Chat-format JSONL with video paths -> batches of a model's own processor, with labels on the assistant's turns.

One JSON object a line, in either of the two forms that Qwen fine-tuning uses:

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat moves?"},
                                         {"from": "gpt", "value": "A square."}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "A square."}]}

``video`` and ``image`` may be lists, one item per ``<video>`` and ``<image>``. Paths are relative to the file. A video
is whatever OpenCV decodes, or a .npy file of uint8 frames (F, H, W, 3) with ``"fps"`` beside it (2 by default).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evs_vllm.errors import EVSError
from evs_vllm.families.front_end import watch_processor
from evs_vllm.train.synthetic import Example, SceneSettings, make_example

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TAG = re.compile(r"(<video>|<image>)\n?")
IGNORED = -100


class DataError(EVSError):
    """A line of a data file, or a video, cannot be used."""


@dataclass(frozen=True)
class Video:
    """Sampled frames and where they come from.

    Attributes:
        frames: (F, H, W, 3) uint8.
        indices: Their numbers in the file.
        fps: Frames per second of the file.
        total: Frames of the file.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    fps: float
    total: int


@dataclass(frozen=True)
class FrameSettings:
    """How frames are sampled: `fps` of them a second, spread evenly where that is more than `max_frames`."""

    fps: float = 2.0
    max_frames: int = 64

    def pick(self, total: int, fps: float) -> list[int]:
        """Numbers of the frames to take of a file with `total` frames at `fps`."""
        count = max(1, min(total, self.max_frames, round(total / fps * self.fps)))
        return [int(i) for i in np.linspace(0, total - 1, count).round()]


def load_video(path: Path, settings: FrameSettings, npy_fps: float = 2.0) -> Video:
    """Decodes and samples a video.

    Raises:
        DataError: There is no such file or it cannot be decoded.
    """
    if not path.is_file():
        raise DataError(f"no such video: {path}")
    if path.suffix == ".npy":
        frames = np.load(path)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise DataError(f"{path}: expected uint8 frames (F, H, W, 3), got {frames.dtype} {frames.shape}")
        wanted = settings.pick(len(frames), npy_fps)
        return Video(frames[wanted], tuple(wanted), npy_fps, len(frames))
    try:
        import cv2
    except ImportError as error:
        raise EVSError("decoding video needs OpenCV: pip install 'evs-vllm[train]'") from error
    capture = cv2.VideoCapture(str(path))
    try:
        total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), float(capture.get(cv2.CAP_PROP_FPS))
        if total < 1 or not fps > 0:
            raise DataError(f"{path}: cannot be decoded")
        wanted = settings.pick(total, fps)
        frames = []
        for number in range(wanted[-1] + 1):
            if not capture.grab():
                raise DataError(f"{path}: says it has {total} frames but ends after {number}")
            if number in wanted:
                frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    return Video(np.stack(frames), tuple(wanted), fps, total)


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record in the form of chat templates: every content is a list of text, image and video parts.

    Raises:
        DataError: It has neither form, an unknown role, no answer, or media that do not fit its tags.
    """
    if "messages" in record:
        messages = [
            {"role": _role(turn.get("role")), "content": _parts(turn.get("content"))} for turn in record["messages"]
        ]
    elif "conversations" in record:
        media = {kind: _listed(record.get(kind)) for kind in ("video", "image")}
        messages = []
        for turn in record["conversations"]:
            parts: list[dict[str, Any]] = []
            for piece in _TAG.split(str(turn.get("value"))):
                kind = piece.strip("<>\n")
                if piece in ("<video>", "<image>"):
                    if not media[kind]:
                        raise DataError(f"more {piece} than entries of {kind!r}")
                    parts.append({"type": kind, kind: media[kind].pop(0)})
                elif piece:
                    parts.append({"type": "text", "text": piece})
            messages.append({"role": _role(turn.get("from")), "content": parts})
        if media["video"] or media["image"]:
            raise DataError("more entries of 'video' or 'image' than tags")
    else:
        raise DataError("has neither 'messages' nor 'conversations'")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("has no turn of the assistant, so there is nothing to learn")
    return messages


def _role(name: Any) -> str:
    if name not in _ROLES:
        raise DataError(f"unknown role {name!r}; known: {', '.join(_ROLES)}")
    return _ROLES[name]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError("a 'content' is neither text nor a list of parts")
    for part in content:
        if part.get("type") not in ("text", "video", "image") or part["type"] not in part:
            raise DataError(f"unknown part {part!r}; known types: text, video, image")
    return content


class ChatDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The lines of a JSONL file. An item is ``{"messages", "videos", "images"}`` with decoded media in prompt order.

    Raises:
        DataError: A line cannot be used; the text names file and line. (Videos are looked at when they are needed.)
    """

    def __init__(self, path: str | Path, frames: FrameSettings | None = None) -> None:
        self.path, self.frames = Path(path), frames or FrameSettings()
        if not self.path.is_file():
            raise DataError(f"no such data file: {path}")
        self._items: list[tuple[list[dict[str, Any]], float]] = []
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError("is no JSON object")
                self._items.append((messages_of(record), float(record.get("fps", 2.0))))
            except (DataError, json.JSONDecodeError) as error:
                raise DataError(f"{self.path}, line {number}: {error}") from None
        if not self._items:
            raise DataError(f"{self.path} is empty")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        messages, npy_fps = self._items[index]
        parts = [part for message in messages for part in message["content"]]
        videos = [
            load_video(self.path.parent / part["video"], self.frames, npy_fps) for part in parts if "video" in part
        ]
        images = [_load_image(self.path.parent / part["image"]) for part in parts if "image" in part]
        return {"messages": messages, "videos": videos, "images": images}


def _load_image(path: Path) -> Any:
    from PIL import Image

    if not path.is_file():
        raise DataError(f"no such image: {path}")
    with Image.open(path) as image:
        return image.convert("RGB")


class ChatCollator:
    """Items of a dataset -> what the model takes, padded on the right.

    Labels are the assistant's turns with the token that ends them; everything else is -100. The collator does not draw
    the rate: it runs ahead of training, in worker processes, and what it drew there would be lost on resume.

    Args:
        processor: The model's. From now on it hands on what clips are judged by (as with `evs_vllm.hf.enable`).
        max_length: Longest unpruned sequence; a longer one is an error, since cutting would cut a clip in two.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        watch_processor(processor.video_processor, with_cells=True)
        self.processor, self.max_length = processor, max_length
        tokenizer = processor.tokenizer
        self._header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self._end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        from transformers.video_utils import VideoMetadata

        template = self.processor if getattr(self.processor, "chat_template", None) else self.processor.tokenizer
        videos = [video for item in items for video in item["videos"]]
        images = [image for item in items for image in item.get("images", ())]
        batch = self.processor(
            text=[template.apply_chat_template(item["messages"], tokenize=False) for item in items],
            videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos] or None,
            images=images or None,
            video_metadata=[
                VideoMetadata(total_num_frames=video.total, fps=video.fps, frames_indices=list(video.indices))
                for video in videos
            ]
            or None,
            do_sample_frames=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        length = batch["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"a sequence of {length} tokens is longer than data.max_length={self.max_length}; take fewer frames "
                "(data.max_frames) or smaller ones"
            )
        turns = [sum(message["role"] == "assistant" for message in item["messages"]) for item in items]
        labels = [self._labels(row, count) for row, count in zip(batch["input_ids"], turns, strict=True)]
        return {**batch, "labels": torch.stack(labels)}

    def _labels(self, ids: torch.Tensor, turns: int) -> torch.Tensor:
        row, labels = ids.tolist(), torch.full_like(ids, IGNORED)
        size, found, start = len(self._header), 0, 0
        while start + size <= len(row):
            if row[start : start + size] == self._header and self._end in row[start:]:
                first, last = start + size, row.index(self._end, start + size)
                labels[first : last + 1] = ids[first : last + 1]
                found, start = found + 1, last
            start += 1
        if found != turns:
            raise DataError(
                f"the chat template shows {found} of {turns} assistant turns as "
                "'<|im_start|>assistant\\n...<|im_end|>'; templates of another form are not supported"
            )
        return labels


class DrawnDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Synthetic examples (`evs_vllm.train.synthetic`), drawn when they are asked for; the same index gives the same."""

    def __init__(self, settings: SceneSettings, count: int, seed: int = 0) -> None:
        self.settings, self.count, self.seed = settings, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return as_item(make_example(self.settings, [self.seed, index]))


def as_item(example: Example) -> dict[str, Any]:
    """A synthetic example in the form of a dataset's items."""
    frames = example.frames
    video = Video(frames, tuple(range(len(frames))), example.fps, len(frames))
    messages = [
        {
            "role": "user",
            "content": [{"type": "video", "video": "drawn"}, {"type": "text", "text": example.question}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
    ]
    return {"messages": messages, "videos": [video], "images": []}
