# SPDX-License-Identifier: Apache-2.0
"""The one Triton gate: is it there, does it interpret, and on which device does a launch go."""

import contextlib
import functools
from contextlib import AbstractContextManager

import torch


@functools.cache
def available() -> tuple[bool, str]:
    """(True, "") when Triton imports, else (False, reason)."""
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken install raises more than ImportError
        return False, f"Triton cannot be imported ({type(error).__name__}: {error})"
    return True, ""


@functools.cache
def interpreting() -> bool:
    """True when this process runs Triton kernels in the interpreter.

    Triton settles this when it is imported, so the variable's present value would be the wrong thing to ask.
    """
    if not available()[0]:
        return False
    import triton
    import triton.language as tl

    return not isinstance(tl.cdiv, triton.JITFunction)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device, in the order of the current stream."""
    # A copy from memory that is not pinned may wait for what the device is doing.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
