# SPDX-License-Identifier: Apache-2.0
"""The learned descriptor: a small network whose outputs are as far apart as a pretrained vision tower's features.

``python -m bench.descriptor`` trained it; its weights and how they came about are in ``learned.npz``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from evs_vllm.core.clip import Clip
from evs_vllm.core.descriptors import Descriptor, low_resolution, normalised

WEIGHTS = Path(__file__).with_name("learned.npz")
"""Numbers in here are part of what a selection is: other ones need another `evs_vllm.config.IDENTITY_VERSION`."""

CELLS = 4
"""Cells along one side of a token that the network looks at."""

DISTANCE = 512
"""L1 distance between descriptors of tokens whose features are at a right angle, seen from the mean of the clip."""

_ROWS = 2048  # tokens described at a time, so that what lies between two layers stays in a core's cache


@dataclass(frozen=True)
class Layer:
    """``floor((rows @ weight + bias) / 2**shift)``, in integers below 2**24.

    Attributes:
        weight: (inputs, outputs) float32, whole numbers.
        bias: (outputs,) float32, whole numbers; half of 2**shift, which makes it round, is in it.
        shift: Bits that are cut off.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    shift: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, inputs) float32 whole numbers to (n, outputs)."""
        return torch.addmm(self.bias, rows, self.weight).mul_(0.5**self.shift).floor_()

    def to(self, device: torch.device) -> "Layer":
        return Layer(self.weight.to(device), self.bias.to(device), self.shift)


class Network:
    """Layers over the values of one token each; what lies between two layers is cut to a byte.

    Args:
        layers: From the first to the last.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._on_device = {self.layers[0].weight.device: self.layers}

    @classmethod
    def read(cls, data: bytes) -> "Network":
        """The network in the bytes of an ``.npz`` file as `bench.descriptor` writes it."""
        arrays = np.load(BytesIO(data))
        shifts = arrays["shifts"].tolist()

        def numbers(name: str) -> torch.Tensor:
            return torch.from_numpy(arrays[name].astype(np.float32))

        return cls([Layer(numbers(f"weight{i}"), numbers(f"bias{i}"), shift) for i, shift in enumerate(shifts)])

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Describes tokens.

        Args:
            rows: (n, inputs) int32, as `inputs_of` makes them.

        Returns:
            (n, F) uint8.
        """
        layers = self._layers(rows.device)
        described = []
        for some in rows.split(_ROWS):
            values = some.float()
            for layer in layers[:-1]:
                values = layer(values).clamp_(0, 255)
            described.append(layers[-1](values).add_(128).clamp_(0, 255).to(torch.uint8))
        return torch.cat(described)

    def _layers(self, device: torch.device) -> tuple[Layer, ...]:
        if device not in self._on_device:
            self._on_device[device] = tuple(layer.to(device) for layer in self.layers)
        return self._on_device[device]


def inputs_of(cells: torch.Tensor) -> torch.Tensor:
    """What the network sees of each token.

    Args:
        cells: (T, H, W, C, C, 3) uint8, from `low_resolution`.

    Returns:
        (T, H * W, 3 * C * C + 6) int32 within -128..127: normalised cells, and mean and standard deviation around.
    """
    values, means, deviations = normalised(cells)
    parts = [values.flatten(3), means - 128, deviations.clamp(max=127)]
    return torch.cat(parts, dim=3).flatten(1, 2)


class Learned(Descriptor):
    """Distances of a pretrained tower's features, guessed from 4 x 4 cells a token.

    A threshold counts hundredths of the cosine distance between features, seen from their mean over the clip.
    """

    name = "learned"
    unit = DISTANCE / 100

    @cached_property
    def network(self) -> Network:
        """Read on first use."""
        return Network.read(WEIGHTS.read_bytes())

    def make(self, clip: Clip) -> torch.Tensor:
        rows = inputs_of(low_resolution(clip, CELLS))
        return self.network(rows.flatten(0, 1)).view(*rows.shape[:2], -1)
