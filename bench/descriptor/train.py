# SPDX-License-Identifier: Apache-2.0
"""Trains a network whose outputs are as far apart, in L1, as a tower's features are, and makes integers of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evs_vllm.core.learned import DISTANCE, Layer, Network

SHORT = 12  # units of a sequence that are looked at in one step
PER_STEP = 6  # sequences


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        inputs: (T, P, K) int32 of `evs_vllm.core.learned.inputs_of`.
        features: (T, P, C) fp16 of the tower, of length 1, without their mean over the sequence.
        weight: How often it is drawn, compared with others.
    """

    inputs: torch.Tensor
    features: torch.Tensor
    weight: float


def centred(features: torch.Tensor) -> torch.Tensor:
    """(T, P, C) features without their mean over the clip, of length 1."""
    return F.normalize(features.float() - features.float().mean((0, 1)), dim=-1)


def fit(
    samples: list[Sample], widths: list[int], steps: int, seed: int, log: Callable[[str], None] = print
) -> nn.Sequential:
    """Trains on pairs of tokens of one place, one unit and two random numbers of units apart.

    Args:
        samples: What to learn from.
        widths: Of the layers' outputs; the last one is that of the descriptor.
        steps: Of the optimiser.
        seed: Of weights and draws.

    Returns:
        Linear layers with ReLU between them, which take inputs in float32 as they are.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sizes = [samples[0].inputs.shape[-1], *widths]
    layers = [nn.Linear(before, after) for before, after in zip(sizes[:-1], sizes[1:], strict=True)]
    with torch.no_grad():
        layers[0].weight /= 32  # inputs are integers of about that size
        layers[-1].weight.normal_(0, 0.02)
    network = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    # Rows of the first layer see inputs 32 times as large: its steps are as much smaller.
    groups = [{"params": layers[0].weight, "lr": 3e-3 / 32}, {"params": [layers[0].bias], "lr": 3e-3}]
    groups += [{"params": layer.parameters(), "lr": 3e-3} for layer in layers[1:]]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
    )
    weights = np.array([sample.weight for sample in samples])
    loss_of_late, started = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        drawn = rng.choice(len(samples), PER_STEP, p=weights / weights.sum())
        loss = torch.stack([_loss(network, samples[index], rng) for index in drawn]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_of_late += float(loss.detach())
        if step % 500 == 0:
            log(f"step {step} of {steps}: loss {loss_of_late / 500:.4f}, {time.perf_counter() - started:.0f} s")
            loss_of_late = 0.0
    return network.eval()


def _loss(network: nn.Sequential, sample: Sample, rng: np.random.Generator) -> torch.Tensor:
    """Mean squared error of the distances of pairs of tokens, where 1 is a right angle between features."""
    first = int(rng.integers(0, max(1, len(sample.inputs) - SHORT + 1)))
    some = slice(first, first + SHORT)
    described, features = network(sample.inputs[some].float()), sample.features[some].float()
    units = len(features)
    apart = {min(each, units - 1) for each in (1, *rng.integers(2, max(3, units), 2).tolist())}
    errors = []
    for gap in sorted(apart - {0}):
        wanted = 1 - (features[gap:] * features[:-gap]).sum(-1)
        got = (described[gap:] - described[:-gap]).abs().sum(-1)
        errors.append(((got - wanted) ** 2).mean())
    return torch.stack(errors).mean()


@torch.inference_mode()
def in_integers(network: nn.Sequential, samples: list[Sample]) -> Network:
    """The network in integers: 16 bits a weight, a byte between layers, sums below 2**24.

    Args:
        network: As `fit` returns it.
        samples: By which the size of what lies between layers is measured.
    """
    linear = [part for part in network if isinstance(part, nn.Linear)]
    rows = torch.cat([sample.inputs.flatten(0, 1)[::7] for sample in samples]).float()
    layers, scale_in, largest = [], 1.0, 128
    for number, layer in enumerate(linear):
        rows = layer(rows)
        if number < len(linear) - 1:
            rows = rows.relu()
            scale_out = float(np.quantile(rows.numpy(), 0.9999)) / 255
        else:
            scale_out = 1 / DISTANCE
        layers.append(_rounded(layer.weight.T * (scale_in / scale_out), layer.bias / scale_out, largest))
        scale_in, largest = scale_out, 255
    return Network(layers)


def _rounded(weight: torch.Tensor, bias: torch.Tensor, largest: int) -> Layer:
    """The layer with as many bits after the point as weights of 16 bits and sums below 2**24 allow."""
    for shift in range(14, -1, -1):
        whole, offset = (weight * 2**shift).round(), (bias * 2**shift + 2**shift / 2).floor()
        sums = whole.abs().sum(0) * largest + offset.abs()
        if whole.abs().max() < 2**15 and sums.max() < 2**24:
            return Layer(whole.contiguous(), offset, shift)
    raise ArithmeticError("weights are too large for sums below 2**24")
