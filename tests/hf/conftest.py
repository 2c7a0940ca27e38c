# SPDX-License-Identifier: Apache-2.0
"""The models that the tests of `evs_vllm.hf` enable EVS on."""

import copy

import pytest

from evs_vllm.families.front_end import unwatch_processor


@pytest.fixture
def ref(reference, family):
    return reference(family)


@pytest.fixture
def model(ref):
    """A copy of the reference's model, without EVS. What a test tells the processor ends with it."""
    yield copy.deepcopy(ref.model)
    unwatch_processor(ref.processor.video_processor)
