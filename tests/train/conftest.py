# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the training tests."""

from collections.abc import Iterator

import pytest
import torch
from torch import set_num_threads  # now: once an engine has run in this process, vLLM's CPU worker has replaced it


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    set_num_threads(1)
    assert torch.get_num_threads() == 1
    yield
    set_num_threads(before)
