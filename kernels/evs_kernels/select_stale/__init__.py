# SPDX-License-Identifier: Apache-2.0
"""select_stale: the dropped tokens that differ most from what was last computed at their place."""

import torch

from .. import _validate
from .._dispatch import implementation


def select_stale(tokens: torch.Tensor, kept: torch.Tensor, budget: int, *, backend: str = "auto") -> torch.Tensor:
    """Chooses dropped tokens to compute anew, because the content of their place moved on since it was last computed.

    At a level L, go through the units in order: token (t, p) is stale when it is not kept and the L1 distance between
    its values and those of token (s, p) is at least L, where s < t is the latest unit in which p was kept or stale. The
    distance is taken over every `SAMPLE`-th value of D, which ranks tokens as well and moves less memory. L is found by
    bisection of [1, 255 * values + 1]: a level with more than ``budget`` stale tokens is too low, any other is not.

    Args:
        tokens: (T, P, D) uint8, contiguous, T, P, D >= 1; any device.
        kept: (K,) int64, strictly ascending flat indices ``t * P + p``; unit 0 whole. On the tokens' device. Neither
            is checked on a GPU, where looking would stall the stream.
        budget: most tokens to return; >= 0.
        backend: one of ``evs_kernels.BACKENDS``. triton waits for the device once, to learn the count.

    Returns:
        int64 (S,) ascending flat indices, S <= budget, none of them in ``kept``; the same in every backend. A token
        that equals what was last computed is never among them.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or layout, a negative budget; on the CPU also indices that are out of order,
            out of range or leave out some of unit 0.
    """
    _validate.clip_tokens("tokens", tokens, (torch.uint8,))
    _validate.tensor("kept", kept, "K", (torch.int64,))
    _validate.same_device("kept", kept, "tokens", tokens)
    _validate.kept_indices("kept", kept, tokens.shape[0], tokens.shape[1])
    budget = _validate.count("budget", budget)
    run = implementation("select_stale", backend, tokens.device)
    stale: torch.Tensor = run(tokens, kept, budget)
    return stale
