# SPDX-License-Identifier: Apache-2.0
"""Every implementation of every op against the reference, over the OpSpec table."""

import pytest
import torch

import evs_kernels
from evs_kernels.testing import SPECS, OpSpec, assert_same

HOST = {"weights", "tokens"}
"""Arguments that stay in host memory."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cases():
    """One pytest parameter per op, dtype and shape, with a readable id."""
    for spec in SPECS:
        for dtype in spec.dtypes:
            for shape in (*spec.shapes, *spec.large_shapes):
                label = f"{spec.name}-{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}"
                yield pytest.param(spec, dtype, shape, id=label)


def need(spec: OpSpec, backend: str, device: str) -> None:
    """Skips with the reason when the implementation cannot run here."""
    ok, reason = evs_kernels.supported(spec.name, backend, device)
    if not ok:
        pytest.skip(reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("spec", "dtype", "shape"), list(cases()))
def test_matches_reference(spec, dtype, shape, backend, device, generator):
    need(spec, backend, device)
    if backend == "triton" and device == "cpu" and shape in spec.large_shapes:
        pytest.skip("too slow in Triton's interpreter")
    for call in spec.calls(generator, dtype, shape):
        want = spec.op(*call.args, **call.kwargs, backend="ref")
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in call.args]
        kwargs = {
            k: v.to(device) if isinstance(v, torch.Tensor) and k not in HOST else v for k, v in call.kwargs.items()
        }
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        before = [a.clone() for a in given]
        got = spec.op(*args, **kwargs, backend=backend)
        if isinstance(got, tuple):
            got = type(got)(*(part.cpu() for part in got))
        else:
            got = got.cpu()
        assert type(got) is type(want)
        assert_same(got, want)
        for arg, copy in zip(given, before, strict=True):
            assert arg.view(torch.uint8).equal(copy.view(torch.uint8))


def test_table_covers_every_op():
    assert tuple(spec.name for spec in SPECS) == evs_kernels.OPS
    assert set(evs_kernels.OPS) <= set(evs_kernels.__all__)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_repeats_bit_for_bit(backend, generator):
    need(SPECS[0], backend, "cpu")
    clip = torch.randn((4, 3, 1100), generator=generator)
    first = evs_kernels.temporal_score(clip, backend=backend)
    assert torch.equal(first, evs_kernels.temporal_score(clip, backend=backend))
