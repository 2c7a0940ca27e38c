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
        weight: (inputs, outputs) float32 or float64, whole numbers.
        bias: (outputs,) of the same, whole numbers; half of 2**shift, which makes it round, is in it.
        shift: Bits that are cut off.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    shift: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, inputs) whole numbers of the same type to (n, outputs)."""
        return torch.addmm(self.bias, rows, self.weight).mul_(0.5**self.shift).floor_()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Layer":
        return Layer(self.weight.to(device, dtype), self.bias.to(device, dtype), self.shift)


class Network:
    """Layers over the values of one token each; what lies between two layers is cut to a byte.

    Args:
        layers: From the first to the last.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._made: dict[tuple[torch.device, torch.dtype], tuple[Layer, ...]] = {}

    @classmethod
    def read(cls, data: bytes) -> "Network":
        """The network in the bytes of an ``.npz`` file as `bench.descriptor` writes it."""
        arrays = np.load(BytesIO(data))
        layers = []
        for number, shift in enumerate(arrays["shifts"].tolist()):
            weight, bias = (arrays[f"{part}{number}"].astype(np.float32) for part in ("weight", "bias"))
            layers.append(Layer(torch.from_numpy(weight), torch.from_numpy(bias), shift))
        return cls(layers)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Describes tokens.

        Args:
            rows: (n, inputs) int32, as `inputs_of` makes them.

        Returns:
            (n, F) uint8.
        """
        dtype = _exact_in(rows.device)
        layers = self._layers(rows.device, dtype)
        described = []
        with torch.autocast(rows.device.type, enabled=False):  # a training step may have it on
            for some in rows.split(_ROWS):
                values = some.to(dtype)
                for layer in layers[:-1]:
                    values = layer(values).clamp_(0, 255)
                described.append(layers[-1](values).add_(128).clamp_(0, 255).to(torch.uint8))
        return torch.cat(described)

    def _layers(self, device: torch.device, dtype: torch.dtype) -> tuple[Layer, ...]:
        if (device, dtype) not in self._made:
            self._made[device, dtype] = tuple(layer.to(device, dtype) for layer in self.layers)
        return self._made[device, dtype]


def _exact_in(device: torch.device) -> torch.dtype:
    """float32 where torch multiplies all of its bits; float64, to which TF32 and its like never apply, elsewhere."""
    try:
        whole = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch does not say where its backends differ in that
        whole = False
    return torch.float32 if whole else torch.float64


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
    counts = "hundredths of the feature distance"

    @cached_property
    def network(self) -> Network:
        """Read on first use."""
        return Network.read(WEIGHTS.read_bytes())

    def make(self, clip: Clip) -> torch.Tensor:
        rows = inputs_of(low_resolution(clip, CELLS))
        return self.network(rows.flatten(0, 1)).view(*rows.shape[:2], -1)
