# SPDX-License-Identifier: Apache-2.0
"""Kept positions run as far as the unpruned prompt did: they must end where the model's rotary cache ends.

vLLM ends prompts and answers at the context length, counted in tokens. `check_positions` refuses a prompt that is too
far along in positions already, `cap_answer_length` ends an answer in time. `evs_vllm.engine.sessions` refuses the input
with which a session would be too far along.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.engine.attached import why_keep_is_forbidden
from evs_vllm.engine.plan_field import plan_of
from evs_vllm.errors import RequestError
from evs_vllm.families import family_of
from evs_vllm.families.base import FamilyAdapter

RESERVE = 32
"""Position IDs kept free behind the last one: drafts of speculation and steps ahead of the answer's end need some."""


def positions_left(prompt_tokens: int, plans: Sequence[RetentionPlan], limit: int) -> int:
    """How many tokens may follow a pruned prompt; less than 1 means that it is too long itself.

    Args:
        prompt_tokens: Length of the pruned prompt.
        plans: Those of its clips.
        limit: Number of position IDs that the model has.
    """
    return _left(prompt_tokens, sum(plan.extra_positions for plan in plans), limit)


def _left(prompt_tokens: int, extra_positions: int, limit: int) -> int:
    return limit - RESERVE - prompt_tokens - extra_positions


def check_positions(
    adapter: FamilyAdapter,
    model_config: Any,
    prompt_tokens: int,
    plans: Sequence[RetentionPlan],
    seconds: Sequence[float | None] | None = None,
) -> None:
    """Refuses a request whose position IDs would leave the rotary cache.

    Args:
        adapter, model_config: Those of the model.
        prompt_tokens: Length of the pruned prompt.
        plans: Those of its clips, in order.
        seconds: Of clips that are parts of one stream, how long each is, where that is known.

    Raises:
        RequestError: They would, or this engine cannot work with kept positions.
    """
    if all(plan.positions != "keep" for plan in plans):
        return
    if why := why_keep_is_forbidden(model_config):
        raise RequestError(f"evs_positions 'keep' is not possible here: {why} Leave it out or set 'sequential'.")
    whole_context = _must_fit_whole(model_config)
    length = max(prompt_tokens, model_config.max_model_len) if whole_context else prompt_tokens
    limit = adapter.max_position(model_config.max_model_len)
    if positions_left(length, plans, limit) < 1:
        taken, needed = sum(plan.position_span for plan in plans), length + sum(plan.extra_positions for plan in plans)
        if seconds is not None and len(plans) > 1:
            fitting = _newest_that_fit(plans, prompt_tokens, model_config.max_model_len if whole_context else 0, limit)
            raise RequestError(_stream_too_long(seconds, fitting, taken, needed, limit))
        way_out = " or serve with a lower --max-model-len" if whole_context else ""
        raise RequestError(
            f"The video(s) of this request take up {taken} position IDs before pruning, and the prompt with them "
            f"{needed}; the model has {limit}. Send fewer frames or a shorter video, set evs_positions to "
            f"'sequential'{way_out}."
        )


def _must_fit_whole(model_config: Any) -> bool:
    """Whether a prompt must leave position IDs for the whole context, however long the answer to it is."""
    # Where the scheduler cannot see the plan it cannot end the answer in time.
    return bool(model_config.multimodal_config.mm_processor_cache_type == "shm")


def why_no_more(model_config: Any, tokens: int, extra_positions: int) -> str:
    """Why a session cannot go on, or "".

    Args:
        model_config: That of the model.
        tokens: Length of the session with all that it would take in next.
        extra_positions: Sum of `RetentionPlan.extra_positions` over its clips.
    """
    context = model_config.max_model_len
    if tokens >= context:
        return f"it has {tokens} tokens then, and the context ends at {context} with at least one for an answer"
    family = family_of(model_config.architecture)
    if family is None or not extra_positions:
        return ""
    length = context if _must_fit_whole(model_config) else tokens
    limit = family.bind(model_config.hf_config).max_position(context)
    if _left(length, extra_positions, limit) >= 1:
        return ""
    return (
        f"its {tokens} tokens take up {length + extra_positions} position IDs then, because the videos count as they "
        f"were before pruning, and the model has {limit}; evs_positions 'sequential' counts kept tokens alone"
    )


def _newest_that_fit(plans: Sequence[RetentionPlan], prompt_tokens: int, least: int, limit: int) -> int:
    """How many of a stream's newest clips would leave position IDs, with a prompt that counts as `least` tokens."""
    # Without the oldest clips the prompt ends earlier by their spans, whatever is kept of the others then; of those no
    # less is kept, so that no more positions are skipped.
    end = prompt_tokens + sum(plan.extra_positions for plan in plans)
    for first, plan in enumerate(plans):
        if _left(max(end, least + sum(each.extra_positions for each in plans[first:])), 0, limit) >= 1:
            return len(plans) - first
        end -= plan.position_span
    return 0


def _stream_too_long(seconds: Sequence[float | None], fitting: int, taken: int, needed: int, limit: int) -> str:
    """What to tell whose stream has run out of position IDs, of which the `fitting` newest clips would leave some."""

    def of_them(number: int) -> str:
        lengths = [each for each in seconds[len(seconds) - number :] if each is not None]
        return f"{number} ({sum(lengths):g} s)" if len(lengths) == number else str(number)

    way_out = f"The newest {of_them(fitting)} would fit: drop older ones, best half of them at a time, as the stream "
    way_out += "then begins anew with the first that is sent; or begin"
    return (
        f"The {of_them(len(seconds))} videos of this stream take up {taken} position IDs before pruning, and the "
        f"prompt with them {needed}; the model has {limit}. {way_out if fitting else 'Begin'} a new session, or set "
        "evs_positions to 'sequential', which counts kept tokens alone."
    )


def take_back(cache: Any, hashes: Iterable[str | None]) -> None:
    """Lets vLLM's processor cache forget clips of a request that is refused after they were put there.

    It takes what it holds for sent to the engine core, and none of it will be. What had been sent before is sent again.

    Args:
        cache: vLLM's, or None.
        hashes: The clips' identities.
    """
    for each in hashes:
        if cache is not None and each is not None:
            cache.invalidate(each)


def check_plans(request: Any) -> None:
    """Reads the plans of a request that comes to the engine core, where an error ends that request alone.

    Raises:
        PlanError: One is no plan of this version: another version's server has made it, or it was changed.
    """
    for feature in request.mm_features or ():
        plan_of(feature.data)


def cap_answer_length(model_config: Any, request: Any) -> None:
    """Shortens the answer to a scheduled request whose position IDs would otherwise leave the rotary cache.

    Of a session, the request holds all inputs, and the answer is that to the latest.
    """
    plans = [plan for feature in request.mm_features or () if (plan := plan_of(feature.data)) is not None]
    family = family_of(model_config.architecture)
    if family is None or all(plan.positions != "keep" for plan in plans):
        return
    limit = family.bind(model_config.hf_config).max_position(model_config.max_model_len)
    room = positions_left(request.num_prompt_tokens, plans, limit)
    request.max_tokens = min(request.max_tokens, max(1, room))
