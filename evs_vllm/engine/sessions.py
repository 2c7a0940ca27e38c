# SPDX-License-Identifier: Apache-2.0
"""Engine sessions, one request that takes in prompts one after the other, end in a clear error before anything else.

``AsyncLLM.generate`` with an async generator of ``StreamingInput`` is such a session. vLLM judges each input by itself.
What they add up to with the answers between, in tokens and in position IDs, is judged here.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from evs_vllm.engine.limits import take_back, why_no_more
from evs_vllm.errors import RequestError

_SESSION = "_evs_session"

_LOOK_AGAIN_S = 0.01
"""Seconds between two looks whether an answer has ended."""


@dataclass
class Session:
    """What a session has taken in so far.

    Attributes:
        inputs: How many prompts.
        tokens: Of those prompts.
        extra_positions: How many more position IDs than tokens their clips take up.
        answers: Tokens of the answers that stay in the session; at most that many while one is being generated.
    """

    inputs: int = 0
    tokens: int = 0
    extra_positions: int = 0
    answers: int = 0


async def admit_input(engine: Any, request: Any, collector: Any) -> None:
    """Lets an input into a session, or refuses it.

    A client need not wait for an answer before its next input. Where it does not, and the input might not fit because
    the answer may get long, the input waits here for the answer's end.

    Args:
        engine: vLLM's `AsyncLLM`.
        request: What the input was made into, an `EngineCoreRequest`.
        collector: The session's `RequestOutputCollector`, on which is noted what the session has taken in.

    Raises:
        RequestError: The session does not fit with it: vLLM would stop serving, or position IDs would leave the rotary
            cache. vLLM ends the session with this error.
    """
    session: Session = getattr(collector, _SESSION, None) or Session()
    states, name = engine.output_processor.request_states, request.request_id
    tokens = session.tokens + len(request.prompt_token_ids)
    extra = session.extra_positions + sum(
        getattr(feature.mm_position, "extra_positions", 0) for feature in request.mm_features or ()
    )

    def answered() -> bool:
        """Whether nothing is being generated; then the answers' length is known."""
        state = states.get(name)
        if state is None or state.input_chunk_queue is not None:
            return state is None
        # Of each answer, the last token was sampled but not computed: vLLM drops it.
        session.answers = state.detokenizer.num_output_tokens() - session.inputs
        return True

    known = answered()
    while (why := why_no_more(engine.model_config, tokens + session.answers, extra)) and not known:
        await asyncio.sleep(_LOOK_AGAIN_S)
        known = answered()
    if why:
        # An error takes the place of what the client has not read yet.
        while collector.output is not None:
            await asyncio.sleep(_LOOK_AGAIN_S)
        take_back(engine.renderer.mm_processor_cache, [feature.mm_hash for feature in request.mm_features or ()])
        raise RequestError(
            f"This session cannot take in more: {why}. It took in {session.inputs} input(s) with {session.tokens} "
            f"tokens and {session.answers} of answers. Begin a new session (its first video without evs_after: to the "
            "new session nothing was shown yet)."
        )
    session.inputs, session.tokens, session.extra_positions = session.inputs + 1, tokens, extra
    session.answers += request.sampling_params.max_tokens
    setattr(collector, _SESSION, session)
