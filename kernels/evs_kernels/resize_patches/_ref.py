# SPDX-License-Identifier: Apache-2.0
"""Reference of resize_patches: torch or Pillow resizes frames, views and permutes lay them out, an index chooses."""

import numpy as np
import torch


def run(
    frames: torch.Tensor,
    height: int,
    width: int,
    tokens: torch.Tensor,
    merge: int,
    side: int,
    unit_frames: int,
    arithmetic: str,
) -> torch.Tensor:
    """See evs_kernels.resize_patches."""
    # Not made contiguous: torch 2.13 fails to resize three planes to a single pixel.
    pictures = frames.cpu().permute(0, 3, 1, 2)
    if arithmetic == "pillow":
        pictures = _resized_by_pillow(pictures, height, width)
    elif pictures.shape[2:] != (height, width):
        pictures = torch.nn.functional.interpolate(
            pictures, (height, width), mode="bicubic", align_corners=False, antialias=True
        )
    units = -(-len(frames) // unit_frames)
    lacking = units * unit_frames - len(frames)
    pictures = torch.cat([pictures, pictures[-1:].expand(lacking, -1, -1, -1)]).contiguous()
    down, across = height // (merge * side), width // (merge * side)
    patches = pictures.view(units, unit_frames, frames.shape[3], down, merge, side, across, merge, side)
    rows = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(units * down * across, -1)
    return rows[tokens].to(frames.device)


def _resized_by_pillow(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    from PIL import Image  # no dependency of this package: only this reference needs it

    planes = [Image.fromarray(plane) for plane in pictures.flatten(0, 1).contiguous().numpy()]
    # In two steps, as from version 13 on Pillow chooses which comes first.
    planes = [plane.resize((width, plane.height), Image.Resampling.BICUBIC) for plane in planes]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).view(*pictures.shape[:2], height, width)
