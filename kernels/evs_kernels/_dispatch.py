# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the ``backend=`` argument, EVS_KERNELS_BACKEND, or the tensor's device."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from . import _triton

BACKENDS = ("auto", "ref", "cpu", "triton")
"""auto: the fastest for the tensor's device; ref: plain torch; cpu: numba; triton: GPU (or Triton's interpreter)."""

OPS = (
    "temporal_score",
    "cosine_score",
    "select_topk",
    "select_threshold",
    "select_anchored",
    "select_hold",
    "prune_topk",
    "pool_tokens",
    "pool_frames",
    "resize_patches",
    "place_blocks",
)

_MODULES = {"ref": "_ref", "cpu": "_cpu", "triton": "_triton_kernels"}


def supported(op: str, backend: str, device: str | torch.device) -> tuple[bool, str]:
    """Says whether ``op`` can run with ``backend`` on tensors of ``device``.

    Args:
        op: one of ``OPS``.
        backend: one of ``BACKENDS``.
        device: where the input lives, for example ``"cpu"`` or ``"cuda:0"``.

    Returns:
        (True, "") or (False, reason).

    Raises:
        ValueError: ``op`` or ``backend`` is not a known name.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}; allowed: {', '.join(OPS)}.")
    _check_backend(backend, "backend")
    kind = torch.device(device).type
    if backend == "cpu" and kind != "cpu":
        return False, f"the numba kernels read host memory, and the tensor is on {kind}"
    if backend == "triton":
        ok, reason = _triton.available()
        if not ok:
            return False, reason
        if kind == "cpu" and not _triton.interpreting():
            return False, "Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1 before the first import)"
        if kind not in ("cpu", "cuda"):
            return False, f"the Triton kernels are written for CUDA and ROCm devices, not {kind}"
    return True, ""


def implementation(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """Returns the function that runs ``op``; imports its module on first use.

    Raises:
        ValueError: unknown backend, or one that cannot run here (the message says why).
    """
    name, source = backend, "backend"
    if backend == "auto":
        name, source = os.environ.get("EVS_KERNELS_BACKEND") or "auto", "EVS_KERNELS_BACKEND"
    _check_backend(name, source)
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "triton"
        if not supported(op, name, device)[0]:
            name = "ref"
    ok, reason = supported(op, name, device)
    if not ok:
        raise ValueError(f"{source}: got {name!r} for {op} on {device}, but {reason}. Use 'auto' or 'ref'.")
    return _load(op, name)


def _check_backend(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}; allowed: {', '.join(BACKENDS)}.")


@functools.cache
def _load(op: str, backend: str) -> Callable[..., Any]:
    # importlib and not an attribute: the public function hides the op's folder of the same name.
    return importlib.import_module(f"evs_kernels.{op}.{_MODULES[backend]}").run
