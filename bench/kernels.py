# SPDX-License-Identifier: Apache-2.0
"""Times the kernels against torch eager, vLLM's own pruning mask and a plain copy, on one clip, in one run.

Every row is checked first; a row whose result is wrong gets no time. Example:
``python -m bench.kernels --shape 32 648 4704 --rate 0.75 --out bench/results/cpu/mine.json``
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import evs_kernels as ek
from bench.common import harness
from evs_kernels.testing import assert_same, random_clip

PATCH = 28  # pixels along the side of one token: 14-pixel patches, merged 2 x 2
FRAMES = 2  # frames in a temporal unit
MERGE = 2
CHANNELS = 3


def main() -> None:
    """Parses the command line, measures, prints a table and writes a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="clip to score; needs OpenCV. Default: a synthetic clip")
    parser.add_argument("--units", type=int, default=32, help="temporal units to take from the video (default: 32)")
    shape = ("T", "P", "D")
    parser.add_argument("--shape", type=int, nargs=3, metavar=shape, default=[32, 648, 4704], help="synthetic clip")
    parser.add_argument("--rate", type=float, default=0.75, help="fraction of tokens to drop (default: 0.75)")
    parser.add_argument("--hidden", type=int, default=3584, help="width of the embeddings (default: 3584)")
    parser.add_argument(
        "--frames", type=int, nargs=3, metavar=("F", "H", "W"), default=[64, 720, 1280], help="as decoded"
    )
    parser.add_argument("--target", type=int, nargs=2, metavar=("H", "W"), default=[588, 1036], help="after the resize")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file. Default: bench/results/<device>/<date>-<commit>-kernels")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(args.seed)
    if args.video:
        clip = load_video(args.video, args.units)
    else:
        clip = random_clip(generator, torch.uint8, tuple(args.shape))
    units, places, depth = clip.shape
    budget = max(places, int(units * places * (1 - args.rate)))
    embeddings = torch.randn((units * places, args.hidden), generator=generator).bfloat16()
    rows = make_rows(clip.to(args.device), embeddings.to(args.device), budget, args.rate)
    frames = torch.randint(0, 256, (*args.frames, CHANNELS), dtype=torch.uint8, generator=generator)
    rows += frame_rows(frames.to(args.device), *args.target, args.rate, generator)
    env = harness.environment()
    results = harness.measure(rows, repeats=args.repeats)

    config = {
        "video": args.video.name if args.video else None,
        "shape": [units, places, depth],
        "clip_bytes": clip.numel(),
        "rate": args.rate,
        "budget": budget,
        "hidden": args.hidden,
        "frames": list(frames.shape),
        "target": args.target,
        "device": args.device,
        "torch_threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "seed": args.seed,
    }
    print(f"clip {units} x {places} x {depth} bytes = {clip.numel() / 1e6:.1f} MB, budget {budget}\n")
    print("\n".join([harness.markdown(results), *harness.warnings(env)]))
    out = args.out or harness.default_path(harness.RESULTS, args.device, "kernels")
    harness.write(harness.report("kernels", config, results, env), out)
    print(f"\nwritten to {out}")


def load_video(path: Path, units: int) -> torch.Tensor:
    """Reads frames spread evenly over a video.

    Returns:
        (units, P, 2 * 28 * 28 * 3) uint8: the pixels of each token.
    """
    import cv2

    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if total < 1:
        raise SystemExit(f"{path}: cannot be read as a video")
    frames = []
    for i in range(units * FRAMES):
        capture.set(cv2.CAP_PROP_POS_FRAMES, i * total // (units * FRAMES))
        ok, frame = capture.read()
        if not ok:
            raise SystemExit(f"{path}: frame {i * total // (units * FRAMES)} cannot be read")
        height, width = (side // PATCH * PATCH for side in frame.shape[:2])
        frames.append(torch.from_numpy(cv2.resize(frame, (width, height))))
    video = torch.stack(frames)
    high, wide = video.shape[1] // PATCH, video.shape[2] // PATCH
    cells = video.view(units, FRAMES, high, PATCH, wide, PATCH, 3).permute(0, 2, 4, 1, 3, 5, 6)
    return cells.reshape(units, high * wide, -1).contiguous()


def make_rows(clip: torch.Tensor, embeddings: torch.Tensor, budget: int, rate: float) -> list[harness.Row]:
    """The rows of the benchmark, the reference as judge of all of ours."""
    wait = torch.cuda.synchronize if clip.is_cuda else lambda: None
    scores = ek.temporal_score(clip, backend="ref")
    chosen = ek.select_topk(scores, budget, backend="ref")
    features = embeddings.view(*clip.shape[:2], -1)
    copy = torch.empty_like(clip)
    rows: list[harness.Row] = []

    def add(name: str, run: Callable[[], Any], want: Any = None, **options: Any) -> None:
        def waited() -> Any:
            result = run()
            wait()
            return result

        check = None if want is None else lambda: assert_same(run(), want)
        rows.append(harness.Row(name, waited, check, **options))

    def eager_clip() -> torch.Tensor:
        wide = clip.to(torch.int16)
        return torch.cat([first, (wide[1:] - wide[:-1]).abs().sum(-1, dtype=torch.int32)])

    def eager_units() -> torch.Tensor:
        pairs = zip(clip[1:], clip[:-1], strict=True)
        later = [(a.to(torch.int16) - b.to(torch.int16)).abs_().sum(-1, dtype=torch.int32) for a, b in pairs]
        return torch.cat([first, torch.stack(later)])

    def eager_prune() -> torch.Tensor:
        best = eager_units()[1:].flatten().topk(budget - places).indices + places
        return torch.cat([torch.arange(places, device=clip.device), best.sort().values])

    places, size = clip.shape[1], clip.numel()
    first = torch.zeros_like(scores[:1])
    pixels = (MERGE, CHANNELS, FRAMES, PATCH // MERGE)
    pictured = clip.shape[2] == FRAMES * PATCH**2 * CHANNELS
    pooled = ek.pool_tokens(clip, *pixels, backend="ref") if pictured else clip[:, :, None, None, :48]
    descriptors = pooled.flatten(2).contiguous()
    anchored = ek.select_anchored(descriptors, budget, backend="ref")
    held = ek.select_hold(descriptors, budget, backend="ref")
    cosine = ek.cosine_score(features, backend="ref")
    score, prune = {"group": "score", "nbytes": size}, {"group": "prune", "nbytes": size}
    add("torch eager score, unit by unit", eager_units, scores, **score, baseline=True)
    add("torch eager score, whole clip", eager_clip, scores, **score)
    add("copy of the clip (limit)", lambda: copy.copy_(clip), clip, **score, note="torch copy_, all threads")
    add("torch eager score + topk", eager_prune, **prune, baseline=True, note="ties in no fixed order: not checked")
    mask = vllm_mask(embeddings, clip.shape[0], places, rate)
    if mask is not None:
        add("vLLM compute_retention_mask", mask, group="prune", note="other input: embeddings, after the tower")
    for backend in ("cpu", "triton"):
        if not ek.supported("prune_topk", backend, clip.device)[0]:
            continue
        ours, kw = f"ours {backend}", {"backend": backend}
        add(f"{ours}: temporal_score", lambda kw=kw: ek.temporal_score(clip, **kw), scores, **score)
        add(f"{ours}: select_topk", lambda kw=kw: ek.select_topk(scores, budget, **kw), chosen)
        add(f"{ours}: prune_topk", lambda kw=kw: ek.prune_topk(clip, budget, **kw), chosen, **prune)
        if pictured:
            add(f"{ours}: pool_tokens", lambda kw=kw: ek.pool_tokens(clip, *pixels, **kw), pooled, **score)
        add(f"{ours}: select_anchored", lambda kw=kw: ek.select_anchored(descriptors, budget, **kw), anchored)
        add(f"{ours}: select_hold", lambda kw=kw: ek.select_hold(descriptors, budget, **kw), held)
        add(f"{ours}: cosine_score", lambda kw=kw: ek.cosine_score(features, **kw), cosine, note="embeddings")
    return rows


def frame_rows(
    frames: torch.Tensor, height: int, width: int, rate: float, generator: torch.Generator
) -> list[harness.Row]:
    """The rows of what reads decoded frames. A GPU's resize in torch gives other values than a CPU's."""
    wait = torch.cuda.synchronize if frames.is_cuda else lambda: None
    units, down, across = -(-len(frames) // FRAMES), height // PATCH, width // PATCH
    kept = (torch.rand(units * down * across, generator=generator) >= rate).nonzero().flatten()
    sides, grid = (MERGE, PATCH // MERGE, FRAMES), (4 * down, 4 * across)
    pooled = ek.pool_frames(frames, *grid, FRAMES, backend="ref")
    every = ek.resize_patches(frames, height, width, None, *sides, backend="ref")
    some, copy = every[kept.to(frames.device)], torch.empty_like(frames)
    levels = torch.rand((MERGE**2 * CHANNELS * FRAMES, 256), generator=generator).bfloat16().to(frames.device)
    placed = ek.place_blocks(every, levels, down, across, backend="ref")
    rows: list[harness.Row] = []

    def add(name: str, run: Callable[[], torch.Tensor], want: torch.Tensor | None = None, **options: Any) -> None:
        def waited() -> torch.Tensor:
            result = run()
            wait()
            return result

        check = None if want is None else lambda: assert_same(run(), want)
        rows.append(harness.Row(name, waited, check, nbytes=frames.numel(), **options))

    def resized() -> torch.Tensor:
        pictures = frames.permute(0, 3, 1, 2)
        pictures = pictures.float() if frames.is_cuda else pictures
        return torch.nn.functional.interpolate(pictures, (height, width), mode="bicubic", antialias=True)

    def laid_out() -> torch.Tensor:
        shape = (units, FRAMES, CHANNELS, down, MERGE, PATCH // MERGE, across, MERGE, PATCH // MERGE)
        return resized().reshape(shape).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(every), -1)

    everywhere = not frames.is_cuda and len(frames) % FRAMES == 0
    add("copy of the frames (limit)", lambda: copy.copy_(frames), frames, group="frames")
    add("torch resize", resized, group="frames")
    add("torch resize and layout", laid_out, every if everywhere else None, group="frames", baseline=True)
    for backend in ("cpu", "triton"):
        if not ek.supported("resize_patches", backend, frames.device)[0]:
            continue
        ours, kw = f"ours {backend}", {"backend": backend}
        add(f"{ours}: pool_frames", lambda kw=kw: ek.pool_frames(frames, *grid, FRAMES, **kw), pooled, group="frames")
        for label, tokens, want in (("all", None, every), (f"{len(kept) / len(every):.0%} of the", kept, some)):
            add(
                f"{ours}: resize_patches, {label} tokens",
                lambda tokens=tokens, kw=kw: ek.resize_patches(frames, height, width, tokens, *sides, **kw),
                want,
                group="frames",
            )
        add(
            f"{ours}: place_blocks",
            lambda kw=kw: ek.place_blocks(every, levels, down, across, **kw),
            placed,
            group="frames",
            note="of all tokens; their patches and frames as channels",
        )
    return rows


def vllm_mask(embeddings: torch.Tensor, units: int, places: int, rate: float) -> Callable[[], torch.Tensor] | None:
    """vLLM's own pruning of the same clip, or None without vLLM."""
    try:
        from vllm.multimodal.video_prune.evs import compute_retention_mask
    except ImportError:
        return None
    grid = (units, MERGE, MERGE * places)  # only the number of tokens matters to it
    return lambda: compute_retention_mask(embeddings, grid, MERGE, rate)


if __name__ == "__main__":
    main()
