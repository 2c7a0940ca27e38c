# SPDX-License-Identifier: Apache-2.0
"""Random requests: clips of any size and length, pictures, streams, any settings, and some that have to be refused."""

import base64
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evs_vllm.serving import data_url, video_part
from evs_vllm.testing import synthetic_clip

Kind = Literal["text", "clip", "clips", "picture", "stream", "refused", "abort"]

SHARES: dict[Kind, float] = {
    "text": 0.05,
    "clip": 0.35,
    "clips": 0.15,
    "picture": 0.1,
    "stream": 0.2,
    "refused": 0.1,
    "abort": 0.05,
}
"""How often each kind comes."""

REFUSED: tuple[dict[str, Any], ...] = (
    {"evs_rate": 1},
    {"evs_rate": "0.5"},
    {"evs_ratio": 0.5},
    {"evs_positions": "kept"},
    {"evs_rate": 0.5, "evs_threshold": 3},
    {"evs_max_tokens": 0},
)


@dataclass(frozen=True)
class Asked:
    """One request, and what has to come of it: an answer, HTTP 400, or nothing because the client hangs up."""

    kind: Kind
    body: dict[str, Any]


class Requests:
    """Makes requests by number; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def make(self, number: int) -> Asked:
        """Request `number`, whatever was made before."""
        rng = np.random.default_rng([self.seed, number])
        kind: Kind = rng.choice(list(SHARES), p=list(SHARES.values())).item()
        words = {"type": "text", "text": f"Question {rng.integers(50)}?"}
        content: list[dict[str, Any]] = [words]
        kwargs = self._settings(rng)
        if kind in ("clip", "refused", "abort"):
            content = [self._clip(rng), words]
        elif kind == "clips":
            content = [self._clip(rng), words, self._clip(rng)]
        elif kind == "picture":
            content = [self._picture(rng), self._clip(rng), words]
        if kind == "refused":
            kwargs = dict(REFUSED[rng.integers(len(REFUSED))])
        messages = [{"role": "user", "content": content}]
        if kind == "stream":
            messages, kwargs = self._conversation(rng), {"evs_stream": True}
        body = {"messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": int(rng.integers(1, 12))}
        return Asked(kind, {**body, "mm_processor_kwargs": kwargs} if kwargs else body)

    def _settings(self, rng: np.random.Generator) -> dict[str, Any]:
        every: dict[str, Any] = {
            "evs_rate": round(float(rng.choice([0, 0.3, 0.5, 0.75, 0.9, 0.99])), 2),
            "evs_selection": str(rng.choice(["learned", "contrast", "paper"])),
            "evs_positions": str(rng.choice(["keep", "sequential"])),
            "evs_encoder": str(rng.choice(["full", "reuse"])),
        }
        return {name: value for name, value in every.items() if rng.random() < 0.4}

    def _clip(self, rng: np.random.Generator) -> dict[str, Any]:
        # A third of them come again and again, so that caches are hit, too.
        seed = int(rng.integers(20)) if rng.random() < 0.3 else int(rng.integers(2**31))
        frames = synthetic_clip(int(rng.integers(2, 24)), self._size(rng), moving=0.2, noise=2, seed=seed)
        return _as_video(frames)

    def _size(self, rng: np.random.Generator) -> tuple[int, int]:
        return int(rng.integers(56, 200)), int(rng.integers(56, 200))

    def _picture(self, rng: np.random.Generator) -> dict[str, Any]:
        frame = synthetic_clip(1, self._size(rng), "noise", seed=int(rng.integers(2**31)))[0]
        return {"type": "image_url", "image_url": {"url": data_url(_jpeg(frame), "image/jpeg")}}

    def _conversation(self, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Some turns of one of a few conversations, each of which comes again with more or fewer turns."""
        conversation = int(rng.integers(10))
        messages = []
        for turn in range(int(rng.integers(1, 6))):
            frames = synthetic_clip(4, (84, 112), moving=0.3, seed=10_000 + 100 * conversation + turn)
            content = [_as_video(frames), {"type": "text", "text": f"And now, {turn}?"}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "Something moves."}]
        return messages[:-1]


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def _as_video(frames: np.ndarray) -> dict[str, Any]:
    parts = ",".join(base64.b64encode(_jpeg(frame)).decode() for frame in frames)
    return video_part(f"data:video/jpeg;base64,{parts}")
