# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests.

Triton decides when it is imported whether it interprets or compiles, for the whole process. So neither mode is chosen
here: test_interpreter.py runs the Triton cases in a process with TRITON_INTERPRET=1, test_compile.py compiles in
others, and nothing leaks into the environment of this process or of its other children.
"""

import os
import random

import numpy as np
import pytest
import torch

from evs_kernels import _memory


@pytest.fixture
def seed() -> int:
    """A fresh seed for every run, shown when the test fails; EVS_TEST_SEED repeats one."""
    value = int(os.environ.get("EVS_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"EVS_TEST_SEED={value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A torch generator with the fresh seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills empty memory of torch and numpy with NaN or large numbers, so that an element never written is noticed."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    # Not np.empty itself, which numba looks up when it compiles.
    monkeypatch.setattr(_memory, "uninitialized", lambda size, dtype: np.full(size, 249, dtype))


def _poisoned(function):
    def make(*args, **kwargs):
        tensor = function(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max - 6)

    return make
