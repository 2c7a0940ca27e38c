# SPDX-License-Identifier: Apache-2.0
"""The demo's model: random weights, small, but with the vision to language cost ratio of Qwen2.5-VL-7B."""

from collections.abc import Callable
from pathlib import Path

FAMILY = "qwen2_5_vl"
# The released 7B model has 0.67 G parameters in the vision tower, which sees 4 patches for each token that its 6.5 G
# parameters of decoder layers see; here it is 8.8 M and 80 M.
SIZES = {
    "hidden_size": 768,
    "layers": 16,
    "heads": 12,
    "kv_heads": 4,
    "vision_hidden": 384,
    "vision_layers": 6,
    "max_tokens_per_frame": 230,
}


def demo_model(say: Callable[[str], None]) -> Path:
    """The folder of the demo's model, made on first use and kept in the temporary directory.

    Args:
        say: Called with a line that says what happens.
    """
    say(f"model     a small {FAMILY} with random weights")
    from evs_vllm.testing import cached_model

    return cached_model(FAMILY, **SIZES)
