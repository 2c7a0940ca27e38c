# SPDX-License-Identifier: Apache-2.0
"""The ledger: everything of vLLM (and llvmlite) that this package builds on, why, and when that can go.

``tests/engine/test_touchpoints.py`` compares each row with the vLLM that is installed. With a new version of vLLM begin
there: what a red row says in `why` is what has to be looked at, before any engine starts. Nothing here imports vLLM, so
the ledger can be read where vLLM cannot be imported.
"""

from evs_vllm.engine.touchpoints import families, models, processors, server, sessions, towers
from evs_vllm.engine.touchpoints.row import Touchpoint, judge, missing

__all__ = ["TOUCHPOINTS", "Touchpoint", "judge", "missing"]

TOUCHPOINTS: tuple[Touchpoint, ...] = (
    server.ROWS + sessions.ROWS + models.ROWS + processors.ROWS + towers.ROWS + families.ROWS
)
