# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a clip stay. A rate is read as an exact decimal."""

import math

from evs_vllm.config import EVSConfig
from evs_vllm.options import exact


def token_floor(num_units: int, tokens_per_unit: int, min_tokens_per_unit: int, continues: bool = False) -> int:
    """Tokens that always stay: unit 0 whole and the minimum of every other unit.

    A clip that goes on from another one (`continues`) has the minimum of every unit, and one token at least.
    """
    least = min(min_tokens_per_unit, tokens_per_unit)
    return max(1, num_units * least) if continues else tokens_per_unit + (num_units - 1) * least


def token_budget(
    num_units: int,
    tokens_per_unit: int,
    config: EVSConfig,
    continues: bool = False,
    stock_count: bool = False,
    saved: int = 0,
) -> int:
    """The number of tokens that `config` keeps of a clip when it sets a rate, or at most keeps when it does not.

    A rate keeps ``floor(N * (1 - rate))`` of the N = T*P tokens. Unit 0 is whole and would take all of that in a
    short clip, which would then be served as one still picture. So of the other units together at least half of their
    share is kept: ``P + ceil((T - 1) * P * (1 - rate) / 2)``, which is the larger number up to
    ``T = (1 + rate) / (1 - rate)`` units: 7 at 0.75, 19 at 0.9.

    Args:
        num_units: T >= 1.
        tokens_per_unit: P >= 1.
        config: The settings.
        continues: Whether the clip goes on from another one (`Clip.previous`). Its unit 0 is not kept whole; it keeps
            at most ``floor(N * (1 - rate)) + saved``, and at most what it would keep if it stood alone.
        stock_count: Whether to keep exactly ``floor(N * (1 - rate))`` of short clips too, as vLLM's
            ``--video-pruning-rate`` does.
        saved: `Anchors.saved` of what it goes on from.

    Returns:
        That number, at most ``max_tokens``, at least the floor of `token_floor`.
    """
    kept = 1 - exact(config.rate or 0)
    budget = math.floor(num_units * tokens_per_unit * kept)
    if continues:
        alone = token_budget(num_units, tokens_per_unit, config, stock_count=stock_count)
        budget = min(budget + saved, alone)
    elif not stock_count:
        budget = max(budget, tokens_per_unit + math.ceil((num_units - 1) * tokens_per_unit * kept / 2))
    if config.max_tokens is not None:
        budget = min(budget, config.max_tokens)
    return max(budget, token_floor(num_units, tokens_per_unit, config.min_tokens_per_unit, continues))


def tokens_saved(num_units: int, tokens_per_unit: int, config: EVSConfig, num_kept: int, saved: int = 0) -> int:
    """What a clip of a stream leaves to the next one of the tokens that the rate allows: `Anchors.saved`.

    A clip's share is ``floor(N * (1 - rate))``. What it leaves of that and of what was saved before is saved, up to P
    tokens, a whole unit: so a cut after a still scene is shown at once, and after its first clip a stream never keeps
    more than its shares in sum. There is no debt, and without a rate nothing is saved.

    Args:
        num_units, tokens_per_unit, config: As for `token_budget`.
        num_kept: Tokens that the clip keeps.
        saved: What was saved before it.

    Returns:
        That number, from 0 to P.
    """
    if not config.rate:
        return 0
    share = math.floor(num_units * tokens_per_unit * (1 - exact(config.rate)))
    return min(max(saved + share - num_kept, 0), tokens_per_unit)
