# SPDX-License-Identifier: Apache-2.0
"""How much tokens of a still scene differ from their anchors: what `Selection.noise` was chosen by.

    python -m bench.stream.noise

takes one picture of each choosing clip, 48 times, puts it under noise and compression, and prints which share of the
tokens of later units (two frames each) differs from its anchor by a threshold or more, mean and highest over the clips.
Chosen was the lowest threshold at which a sensor's noise of 6.4 grey levels leaves less than 5 % in the mean.
"""

import argparse
import sys
from collections import defaultdict

import numpy as np
import torch

from bench.common.tables import markdown
from bench.selection.clips import TOKEN, Library
from bench.selection.conditions import CONDITIONS, as_it_is
from bench.selection.settings import Settings
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Anchors, Clip, Source, TokenPixels
from evs_vllm.core.scorers import SELECTIONS

FRAMES, SEED = 48, 8
THRESHOLDS = (2, 4, 6, 8, 10, 12, 15, 20, 25, 30)


def light_noise(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A better sensor: 1 grey level of its own and less shot noise, 2.7 in mid-grey."""
    frames = as_it_is(pictures, rng).astype(np.float32)
    noise = np.sqrt(1 + 0.05 * frames) * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def clip_of(frames: np.ndarray) -> Clip:
    """Frames as units of two, of tokens of `TOKEN` pixels."""
    units, rows, columns = len(frames) // 2, frames.shape[1] // TOKEN, frames.shape[2] // TOKEN
    cut = torch.from_numpy(frames).view(units, 2, rows, 2, TOKEN // 2, columns, 2, TOKEN // 2, 3)
    tokens = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(units, rows * columns, -1).contiguous()
    return Clip(
        tokens, (units, rows, columns), TokenPixels(2, 3, 2, TOKEN // 2), source=Source(torch.from_numpy(frames), 2)
    )


def shares(name: str, clip: Clip) -> list[float]:
    """For each threshold the share of tokens that a selection calls changed, of all units but the first."""
    selection = SELECTIONS[name]
    looks = selection.looks(clip)[0].cpu()
    goes_on = clip.after(Anchors(looks, (clip.grid[1], clip.grid[2])))  # from its own beginning
    changed = [selection.changed(goes_on, EVSConfig(threshold=level, selection=name)) for level in THRESHOLDS]
    return [100 * count / ((clip.num_units - 1) * clip.tokens_per_unit) for count in changed]


def main() -> int:
    """Measures and prints."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    library, rng = Library(Settings(clips="choose", units=24)), np.random.default_rng(SEED)
    found = defaultdict(list)
    for name in library.single:
        pictures = library.pictures(name)
        still = np.repeat(pictures[len(pictures) // 2][None], FRAMES, axis=0)
        for condition, apply in {"light noise": light_noise, **CONDITIONS}.items():
            if condition not in ("light noise", "noise", "h264") or apply is None:
                continue
            clip = clip_of(apply(still, rng))
            for selection in SELECTIONS:
                found[selection, condition].append(shares(selection, clip))
    rows = []
    for (selection, condition), each in found.items():
        cells = [f"{sum(column) / len(column):.1f}, {max(column):.1f}" for column in zip(*each, strict=True)]
        rows.append([selection, condition, *cells])
    print("\n".join(markdown(("selection", "scene", *map(str, THRESHOLDS)), sorted(rows), "llr")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
