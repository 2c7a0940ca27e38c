# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a clip stay.

The rule for a rate equals that of vLLM's ``--video-pruning-rate``, with the rate read as an exact decimal.
"""

import math

from evs_vllm.config import EVSConfig
from evs_vllm.options import exact


def token_floor(num_units: int, tokens_per_unit: int, min_tokens_per_unit: int, continues: bool = False) -> int:
    """Tokens that always stay: unit 0 whole and the minimum of every other unit.

    A clip that goes on from another one (`continues`) has the minimum of every unit, and one token at least.
    """
    least = min(min_tokens_per_unit, tokens_per_unit)
    return max(1, num_units * least) if continues else tokens_per_unit + (num_units - 1) * least


def token_budget(num_units: int, tokens_per_unit: int, config: EVSConfig, continues: bool = False) -> int:
    """The number of tokens that `config` keeps of a clip when it sets a rate, or at most keeps when it does not.

    Args:
        num_units: T >= 1.
        tokens_per_unit: P >= 1.
        config: The settings.
        continues: Whether the clip goes on from another one (`Clip.previous`).

    Returns:
        ``max(floor, min(floor(N * (1 - rate)), max_tokens))`` with N = T*P and the floor of `token_floor`.
    """
    budget = math.floor(num_units * tokens_per_unit * (1 - exact(config.rate or 0)))
    if config.max_tokens is not None:
        budget = min(budget, config.max_tokens)
    return max(budget, token_floor(num_units, tokens_per_unit, config.min_tokens_per_unit, continues))
