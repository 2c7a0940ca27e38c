# SPDX-License-Identifier: Apache-2.0
"""Trains the learned descriptor: ``python -m bench.descriptor --weights evs_vllm/core/learned.npz``.

Data: clips and photos of Debian packages that nothing is chosen or reported by (`bench.common.material`), fetched on
first use with the weights of the tower (about 900 MB), and kept in the temporary directory with the tower's features.
With ``--compare FOLDER`` other sizes of network are trained too, and a table of what each loses on the clips for
choosing, against its time a token, is written there.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from bench.common import harness, material
from bench.common.pretrained_tower import pretrained_tower
from bench.descriptor import sequences
from bench.descriptor.compare import compare
from bench.descriptor.train import Sample, centred, fit, in_integers
from bench.selection.clips import TOKEN, as_clip
from bench.selection.features import Features
from evs_vllm.core.clip import Clip
from evs_vllm.core.descriptors import low_resolution
from evs_vllm.core.learned import CELLS, Network, inputs_of

GRID = (9, 16)
PHOTO_SEQUENCES = 120
WIDTHS = [128, 64, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="where to write the network (.npz)")
    parser.add_argument("--compare", type=Path, help="folder for the table of other sizes")
    parser.add_argument("--steps", type=int, default=4000, help="of the optimiser (default: 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1; more change the last bits)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seen = list(_look())
    samples = [Sample(inputs_of(low_resolution(clip, CELLS)), features, weight) for clip, features, weight in seen]
    print(f"{len(samples)} sequences of {sum(len(sample.inputs) for sample in samples)} units", flush=True)
    network = in_integers(fit(samples, WIDTHS, args.steps, args.seed, _say), samples)
    if args.weights:
        print(f"SHA-256 of the numbers: {write(network, args.weights, args.steps, args.seed)}")
    if args.compare:
        compare(seen, network, args.steps, args.seed, args.compare, _say)


def _look() -> "list[tuple[Clip, torch.Tensor, float]]":
    """Every sequence as a clip, with its features and how often it is to be drawn."""
    size = (GRID[0] * TOKEN, GRID[1] * TOKEN)
    features = Features(pretrained_tower(), GRID)
    made = [
        *sequences.of_clips(material.files_of(material.TRAIN), size),
        *sequences.of_photos(material.files_of(material.PHOTOS), size, PHOTO_SEQUENCES),
    ]
    seen = []
    for number, sequence in enumerate(made):
        if number % 20 == 0:
            _say(f"{number} of {len(made)} sequences: {sequence.name}")
        if len(sequence.frames) > 1:
            weight = len(sequence.frames) ** 0.5 * (1.5 if sequence.real else 1.0)
            seen.append((as_clip(sequence.frames), centred(features.of(sequence.frames)).half(), weight))
    return seen


def write(network: Network, path: Path, steps: int, seed: int) -> str:
    """Writes the network and how it came about; returns the SHA-256 of its numbers."""
    numbers: dict[str, np.ndarray] = {"shifts": np.array([layer.shift for layer in network.layers], dtype=np.int8)}
    for number, layer in enumerate(network.layers):
        numbers[f"weight{number}"] = layer.weight.numpy().astype(np.int16)
        numbers[f"bias{number}"] = layer.bias.numpy().astype(np.int32)
    digest = hashlib.sha256(b"".join(numbers[name].tobytes() for name in sorted(numbers))).hexdigest()
    made = {
        "command": f"python -m bench.descriptor {' '.join(sys.argv[1:])}",
        "steps": steps,
        "seed": seed,
        "sha256": digest,
        "environment": harness.environment(),
    }
    np.savez_compressed(path, made=np.array(json.dumps(made)), **numbers)
    return digest


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
