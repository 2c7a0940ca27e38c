# SPDX-License-Identifier: Apache-2.0
"""Makes the small model whose answers ``evs-vllm demo`` shows, and asks it about clips that it has not seen.

A base as in the quality lab (bench/quality), then uptrained at random rates on clips that went through H.264, as the
server gets them. ``python -m bench.quality.demo_model`` writes the checkpoint to evs_vllm/demo/model, from where it is
installed with the package, and its accuracy to bench/results/cpu/demo-model.json. With ``--no-train`` it only asks.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import transformers

from bench.common.harness import ROOT
from bench.quality.ask import Variant, ask
from bench.quality.models import Settings, claim, train_further
from evs_vllm.train.synthetic import make_example

MODEL = ROOT / "evs_vllm" / "demo" / "model"
RATES = (0.0, 0.5, 0.75, 0.9)
UNSEEN = 9
"""Seed of the clips that are asked about; those of training have others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quality" / "demo_model.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_model"), help="where checkpoints go")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu" / "demo-model.json")
    parser.add_argument("--no-train", action="store_true", help="ask the model that is there")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = Settings.from_yaml(args.config)
    if not args.no_train:
        claim(args.work, settings)
        (seed,) = settings.seeds
        trained = train_further(args.work, settings, seed, "uptrained")
        shutil.rmtree(MODEL, ignore_errors=True)
        leave = shutil.ignore_patterns("train*", "runs", "*.bin", "README.md")  # what only training needs
        shutil.copytree(trained, MODEL, ignore=leave)
        (MODEL / "model.safetensors").chmod(0o644)
    scene = replace(settings.scenes, h264=settings.training(*settings.further[-1][1:]).h264)
    examples = [make_example(scene, [UNSEEN, number]) for number in range(settings.clips)]
    points = []
    for rate, point in zip(RATES, ask(MODEL, examples, [(Variant(), rate) for rate in RATES]), strict=True):
        points.append({"rate": rate, **{k: point[k] for k in ("accuracy", "tokens", "readable", "tasks")}})
        print(f"rate {rate:g}: {point['accuracy']:.1f} % of {len(examples)}, {point['tokens']:.0f} tokens", flush=True)
    versions = {"torch": transformers.utils.import_utils.get_torch_version(), "transformers": transformers.__version__}
    result = {"command": "python " + " ".join(sys.argv), "config": args.config.name, "versions": versions}
    args.out.write_text(json.dumps(result | {"points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
