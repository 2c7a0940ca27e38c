# SPDX-License-Identifier: Apache-2.0
"""Step "ops": every kernel on the device against the plain reference, over the table that the tests walk.

With a GPU it is Triton that is compared, with ``--device cpu`` numba. Integers have to match exactly. ``--smoke``
leaves out the large inputs; the sanitizer, under which kernels are slow, runs it so.
"""

from typing import Any

import torch

import evs_kernels as ek
from bench.gpu.step import Asked, asked
from evs_kernels.testing import SPECS, Call, OpSpec, assert_same, random_clip

CLIPS = ((16, 324, 4704), (32, 256, 4704), (32, 648, 4704), (256, 729, 4704))
"""(units, tokens per unit, bytes per token) of clips as they are served; the last has more tokens than one block
selects from."""

HOST = {"weights", "tokens"}
"""Arguments of ops that stay in host memory."""


def main(run: Asked) -> None:
    """Compares the ops of the table, then what selects on clips of a served size with numba on the CPU."""
    backend = "triton" if run.on_gpu else "cpu"
    run.findings.table(f"Results of {backend} against the reference", "op", "calls", "that differ")
    generator = torch.Generator().manual_seed(0)
    for spec in SPECS:
        ok, why = ek.supported(spec.name, backend, run.device)
        if not ok:
            run.findings.problem(f"{spec.name} cannot run as {backend}: {why}")
            continue
        calls, wrong = compare(run, spec, backend, generator)
        run.findings.row(spec.name, calls, wrong)
    for shape in () if run.smoke or not run.on_gpu else CLIPS:
        large(run, shape, generator)


def compare(run: Asked, spec: OpSpec, backend: str, generator: torch.Generator) -> tuple[int, int]:
    """(calls, how many of them gave another result than the reference) of one op; each of the latter is a problem."""
    calls = wrong = 0
    for dtype in spec.dtypes:
        for shape in (*spec.shapes, *(() if run.smoke else spec.large_shapes)):
            for call in spec.calls(generator, dtype, shape):
                calls += 1
                if problem := difference(spec, call, backend, run.device):
                    wrong += 1
                    run.findings.problem(f"{spec.name} of {dtype} {shape}: {problem}")
    return calls, wrong


def difference(spec: OpSpec, call: Call, backend: str, device: str) -> str:
    """How an op's result on a device differs from the reference's, or ""."""
    args = [moved(value, device) for value in call.args]
    kwargs = {key: value if key in HOST else moved(value, device) for key, value in call.kwargs.items()}
    try:
        got = on_host(spec.op(*args, **kwargs, backend=backend))
        assert_same(got, spec.op(*call.args, **call.kwargs, backend="ref"))
    except Exception as error:  # also of a launch that fails: the other calls may still work
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def on_host(result: Any) -> Any:
    return type(result)(*(part.cpu() for part in result)) if isinstance(result, tuple) else result.cpu()


def large(run: Asked, shape: tuple[int, int, int], generator: torch.Generator) -> None:
    """Scores and selections of a clip of a served size, against numba on the CPU, which the tests compare."""
    clip = random_clip(generator, torch.uint8, shape)
    budget, there = shape[0] * shape[1] // 4, clip.to(run.device)
    descriptors = clip[:, :, :48].contiguous()
    for name, op, given, options in (
        ("temporal_score", ek.temporal_score, clip, ()),
        ("prune_topk", ek.prune_topk, clip, (budget,)),
        ("select_anchored", ek.select_anchored, descriptors, (budget,)),
        ("select_hold", ek.select_hold, descriptors, (budget,)),
    ):
        try:
            own = there if given is clip else given.to(run.device)
            assert_same(on_host(op(own, *options)), op(given, *options, backend="cpu"))
            run.findings.row(f"{name} of {'x'.join(map(str, shape))}", 1, 0)
        except Exception as error:
            run.findings.row(f"{name} of {'x'.join(map(str, shape))}", 1, 1)
            run.findings.problem(f"{name} of {shape}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(asked(__doc__))
