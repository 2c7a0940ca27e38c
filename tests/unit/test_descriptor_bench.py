# SPDX-License-Identifier: Apache-2.0
"""`bench.descriptor`: what it trains on, that training learns, and that the integers are what was trained."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from bench.descriptor import sequences
from bench.descriptor.__main__ import write
from bench.descriptor.train import Sample, centred, fit, in_integers
from evs_vllm.core.learned import DISTANCE, Network
from evs_vllm.testing import synthetic_clip

SIZE = (56, 112)


@pytest.mark.parametrize("name", sequences.SPOILT)
def test_what_spoils_a_sequence(name):
    frames = synthetic_clip(12, SIZE, moving=0.2, seed=1)
    spoilt, again = (sequences.SPOILT[name](frames, np.random.default_rng(7)) for _ in range(2))
    assert spoilt.shape == frames.shape and spoilt.dtype == np.uint8
    assert (spoilt == again).all() and (spoilt != frames).any()
    assert (spoilt != sequences.SPOILT[name](frames, np.random.default_rng(8))).any()


def test_photos_become_sequences(tmp_path):
    for number in range(3):
        picture = cv2.resize(np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8), (400, 300))
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    files = {path.stem: path for path in sorted(tmp_path.glob("*.png"))}
    made, again = (list(sequences.of_photos(files, SIZE, 12)) for _ in range(2))
    assert len(made) == 12 and not any(each.real for each in made)
    for one, other in zip(made, again, strict=True):
        assert one.frames.shape == (sequences.SHORT, *SIZE, 3) and (one.frames == other.frames).all()
        assert one.name == other.name
    assert any((one.frames != one.frames[0]).any() for one in made)


def learnable(seed: int) -> Sample:
    """Inputs of which one half makes the features, and the other half means nothing."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(-127, 128, (6, 40, 8), generator=generator, dtype=torch.int32)
    mixed = torch.tanh(inputs[..., :4].float() / 64 @ torch.linspace(-1, 1, 48).view(4, 12))
    return Sample(inputs, centred(mixed).half(), 1.0)


def agreement(describe, sample: Sample) -> float:
    """Correlation of distances between described tokens with those of the features."""
    described, features = describe(sample.inputs).float(), sample.features.float()
    got = (described[1:] - described[:-1]).abs().sum(-1).flatten()
    wanted = (1 - (features[1:] * features[:-1]).sum(-1)).flatten()
    return float(torch.corrcoef(torch.stack([got, wanted]))[0, 1])


def test_training_learns_and_integers_are_what_was_trained(tmp_path):
    samples, unseen = [learnable(seed) for seed in range(4)], learnable(99)
    logged: list[str] = []
    trained = fit(samples, [32, 16], 500, 0, logged.append)
    again = fit(samples, [32, 16], 500, 0, logged.append)
    assert all(torch.equal(one, other) for one, other in zip(trained.parameters(), again.parameters(), strict=True))
    assert len(logged) == 2 and logged[0].startswith("step 500 of 500: loss 0.")

    def in_floats(inputs):
        with torch.inference_mode():
            return trained(inputs.float())

    network = in_integers(trained, samples)

    def described(inputs):
        return network(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)

    assert agreement(in_floats, unseen) > 0.8
    assert abs(agreement(in_floats, unseen) - agreement(described, unseen)) < 0.01
    shuffled = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    assert agreement(lambda inputs: shuffled(inputs.float() / 32).detach(), unseen) < 0.7, "untrained it would not pass"
    error = described(unseen.inputs).float() - 128 - DISTANCE * in_floats(unseen.inputs)
    assert error.abs().mean() < 2 and described(unseen.inputs).dtype == torch.uint8
    for layer, largest in zip(network.layers, (128, 255), strict=True):
        sums = layer.weight.abs().sum(0) * largest + layer.bias.abs()
        assert sums.max() < 2**24 and layer.weight.abs().max() < 2**15
        assert torch.equal(layer.weight, layer.weight.round()) and torch.equal(layer.bias, layer.bias.round())

    path = tmp_path / "learned.npz"
    digest = write(network, path, steps=500, seed=0)
    read = Network.read(path.read_bytes())
    assert torch.equal(read(unseen.inputs.flatten(0, 1)), network(unseen.inputs.flatten(0, 1)))
    made = json.loads(str(np.load(path)["made"]))
    assert made["sha256"] == digest and made["seed"] == 0 and made["steps"] == 500
