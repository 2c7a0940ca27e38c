# SPDX-License-Identifier: Apache-2.0
"""Run by test_off.py in a process of its own: writes down everything that vLLM makes of a few requests."""

import hashlib
import json
import sys

import torch

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import IMAGE, VIDEO, Request, ask, chat, start_engine
from tests.reference.hf import Clip, Picture


def digest(value: object) -> object:
    """Comparable and exact: tensors as dtype, shape and a hash of their bytes."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    if isinstance(value, (list, tuple)):
        return [digest(v) for v in value]
    return repr(value)


def main(directory: str, evs: str, out: str) -> None:
    clips = [Clip(synthetic_clip(9 + i, noise=2, seed=i)) for i in range(3)]
    picture = Picture(synthetic_clip(1, (84, 112), "noise", seed=9)[0])
    resized = ask(clips[0].frames)
    resized.mm_processor_kwargs = {"size": {"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28}}
    named = ask(clips[1].frames)
    named.uuids = {"video": ["a-name"]}
    requests = [
        ask(clips[0].frames),
        Request(chat(VIDEO, IMAGE, VIDEO, "Why?"), [clips[1], picture, clips[2]]),
        Request(chat(IMAGE, "Describe the picture."), [picture]),
        Request(chat("Answer with yes or no."), []),
        resized,
        named,
        ask(clips[0].frames),  # from the caches
    ]
    engine = start_engine(directory, json.loads(evs), block_size=32)
    answers = [engine.generate([request])[0] for request in requests]
    report = []
    for sent, answer in zip(engine.sent, answers, strict=True):
        report.append(
            {
                "prompt": list(sent.prompt_token_ids),
                "hashes": [[f.modality, f.identifier, f.mm_hash] for f in sent.mm_features or []],
                "placeholders": [repr(f.mm_position) for f in sent.mm_features or []],
                "kwargs": [
                    None if f.data is None else {k: digest(e.data) for k, e in f.data.items()}
                    for f in sent.mm_features or []
                ],
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [
                    {token: entry.logprob.hex() for token, entry in step.items()} for step in answer.outputs[0].logprobs
                ],
                "cached": answer.num_cached_tokens,
            }
        )
    classes = [f"{c.__module__}.{c.__qualname__}" for c in type(engine.runner.model).__mro__]
    plugin = sorted(name for name in sys.modules if name == "evs_vllm.engine.plugin")
    with open(out, "w") as file:
        json.dump({"requests": report, "model": classes, "plugin": plugin}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
