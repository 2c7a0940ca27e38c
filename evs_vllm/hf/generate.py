# SPDX-License-Identifier: Apache-2.0
"""``forward`` and ``generate()`` of a transformers class, pruning the clips that they get."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.errors import RequestError, UnsupportedError
from evs_vllm.families.front_end import CELLS
from evs_vllm.families.qwen2_vl import PIXELS
from evs_vllm.hf.classes import CLASSES
from evs_vllm.hf.inputs import prune_arguments
from evs_vllm.hf.prompt import Batch
from evs_vllm.hf.state import resolved, state_of
from evs_vllm.requests import admit, split_request_kwargs

PLANS = "evs_plans"
"""The argument of a call that brings plans of its own."""

_MASK = "evs_mask"
"""On a cache that holds pruned prompts: their mask, (rows, length). Not that of the prompts that its caller knows."""


@cache
def pruning_forward(cls: Any) -> Callable[..., Any]:
    stock = cls.forward
    signature = inspect.signature(stock)

    @wraps(stock)  # generate() and Trainer look at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, plans, kwargs = _settings(self, kwargs)
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        given |= bound.get("kwargs", {})
        cells = given.pop(CELLS, None)
        batch = None
        if given.get(PIXELS) is None:
            _check_cache(given)
        elif config.active or plans is not None or state_of(self).served_positions:
            given, batch = prune_arguments(self, config, given, plans, cells)
        else:
            state_of(self).forget()
        return _marked(stock(self, **given), batch)

    return forward


@cache
def pruning_generate(cls: Any) -> Callable[..., Any]:
    stock = cls.generate

    @torch.no_grad()
    @wraps(stock)
    def generate(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        config, plans, kwargs = _settings(self, kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        cells = kwargs.pop(CELLS, None)
        if hasattr(kwargs.get("past_key_values"), _MASK):
            # It would take the tail of the caller's prompt for what follows what the cache holds.
            raise UnsupportedError(
                "This cache holds a pruned prompt, which generate() cannot go on from. Pass the whole conversation, "
                "with its pixels and without past_key_values."
            )
        if kwargs.get(PIXELS) is None:
            return stock(self, *args, **kwargs)
        if not (config.active or plans is not None or state_of(self).served_positions):
            state_of(self).forget()
            return stock(self, *args, **kwargs)
        if kwargs.get("assistant_model") is not None:
            raise UnsupportedError("EVS and assisted generation do not go together; leave assistant_model out.")
        prompt = kwargs.get("input_ids")
        if prompt is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _inferred_mask(self, args, kwargs)
        pruned, batch = prune_arguments(self, config, kwargs, plans, cells)
        if not (batch.mask[:, -1] == 1).all():
            raise RequestError("generate() needs prompts that are padded on the left (padding_side='left').")
        media = (self.config.image_token_id, self.config.video_token_id)
        if any((prompt[:, -1] == token).any() for token in media):  # type: ignore[index]
            # generate() counts on from the last ID, which is not where text after a clip resumes.
            raise RequestError("A prompt ends in an image or a clip; generate() needs some text after it.")
        text = (batch.mask.cumsum(-1) - 1).clamp(min=0)[None].to(pruned["position_ids"].device)
        pruned["position_ids"] = torch.cat([text, pruned["position_ids"]])
        shorter = prompt.shape[1] - pruned["input_ids"].shape[1]  # type: ignore[union-attr]
        _shorten_limits(self, args, pruned, shorter)
        out = _marked(stock(self, *args, **pruned), batch)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        repeats = sequences.shape[0] // prompt.shape[0]  # type: ignore[union-attr]
        new = sequences[:, pruned["input_ids"].shape[1] :]
        whole = torch.cat([prompt.repeat_interleave(repeats, 0).to(new.device), new], dim=1)  # type: ignore[union-attr]
        if isinstance(out, torch.Tensor):
            return whole
        out.sequences = whole
        return out

    return generate


def _settings(
    model: Any, kwargs: Mapping[str, Any]
) -> tuple[EVSConfig, Sequence[RetentionPlan] | None, dict[str, Any]]:
    """The settings of a call, the plans that it brings, and the arguments that are not ours."""
    overrides, rest = split_request_kwargs(kwargs)
    plans = overrides.pop(PLANS, None)
    if CELLS in overrides:
        rest[CELLS] = overrides.pop(CELLS)
    state = state_of(model)
    if state.selection is not None and "evs_selection" in overrides:
        raise RequestError("evs_selection is not possible here: enable() was given an object that chooses.")
    config = resolved(admit(state.config, overrides))
    if config.encoder == "reuse" and not CLASSES[type(model).__name__].reuse:
        raise UnsupportedError(f"encoder 'reuse' does not run in transformers' {type(model).__name__}; use 'full'.")
    return config, plans, rest


def _marked(out: Any, batch: Batch | None) -> Any:
    """The output of a call, its cache marked if it holds pruned prompts."""
    cached = getattr(out, "past_key_values", None)
    if cached is not None and batch is not None and any(plan.num_kept < plan.num_tokens for plan in batch.plans):
        setattr(cached, _MASK, batch.mask)
    return out


def _generation_setting(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """What generate() goes by: an argument, the call's ``generation_config``, or the model's."""
    given = args[0] if args else kwargs.get("generation_config")
    asked = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in asked if value is not None), None)


def _inferred_mask(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask that generate() takes for prompts without one: padding is no text, if it is not the end of text, too."""
    padding, ends = (_generation_setting(model, args, kwargs, f"{name}_token_id") for name in ("pad", "eos"))
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    prompt: torch.Tensor = kwargs["input_ids"]
    if padding is None or padding in ends or not (prompt == padding).any():
        return None
    return (prompt != padding).long()


def _shorten_limits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shorter: int) -> None:
    """``max_length`` and ``min_length`` count the prompt that the caller knows, the stock method the pruned one."""
    for name in ("max_length", "min_length"):
        limit, counted = (
            _generation_setting(model, args, kwargs, each) for each in (name, name.replace("length", "new_tokens"))
        )
        if limit and counted is None:
            kwargs[name] = max(limit - shorter, 0)


def _check_cache(given: Mapping[str, Any]) -> None:
    """A decoding step after a pruned prompt: its mask has to go on from that of the pruned prompt."""
    cache, mask, ids = (given.get(name) for name in ("past_key_values", "attention_mask", "input_ids"))
    pruned: torch.Tensor | None = getattr(cache, _MASK, None)
    if pruned is None or ids is None or not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return
    seen = cache.get_seq_length()  # type: ignore[union-attr]
    if mask.shape[1] != seen + ids.shape[1]:
        raise RequestError(
            f"attention_mask covers {mask.shape[1]} tokens, but the cache holds {seen} (the pruned prompt) and "
            f"{ids.shape[1]} follow. Use generate(), or a mask of that length."
        )
    first_step = seen == pruned.shape[1] and len(mask) == len(pruned)
    if first_step and not torch.equal(mask[:, :seen].cpu() != 0, pruned.cpu() != 0):
        raise RequestError(
            "attention_mask is not that of the pruned prompts, which are padded otherwise than those that were given. "
            "Use generate(), or go on from evs_vllm.hf.last_batch(model).mask."
        )
