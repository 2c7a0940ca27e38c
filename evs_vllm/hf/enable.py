# SPDX-License-Identifier: Apache-2.0
"""Puts EVS into a transformers model: its instance gets a ``forward`` and a ``generate`` that prune first.

The class stays what it is, so that ``save_pretrained`` writes the right ``architectures`` and PEFT, Trainer and
``torch.compile`` find what they know. The methods are bound to the instance (not closures over it), so a deep copy
prunes too and is independent of the original.
"""

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import transformers

from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import Selection
from evs_vllm.errors import ConfigError, UnsupportedError
from evs_vllm.families import family_of
from evs_vllm.families.base import PixelStats
from evs_vllm.families.front_end import unwatch_processor, watch_processor
from evs_vllm.hf import tower
from evs_vllm.hf.classes import CLASSES, SUPPORTED
from evs_vllm.hf.generate import pruning_forward, pruning_generate
from evs_vllm.hf.prompt import Batch
from evs_vllm.hf.state import STATE, Encode, State, base_of, resolved, state_of


def enable(
    model: Any,
    rate: float | None = None,
    *,
    processor: Any = None,
    served_positions: bool = False,
    selection: Selection | str | None = None,
    encode: Encode = tower.encode,
    **options: Any,
) -> Any:
    """Lets a transformers model prune the clips that ``forward`` and ``generate`` get.

    A call may override the settings with the request keys of the server, ``model.generate(..., evs_rate=0.9)``, and
    bring plans that were made elsewhere, one per clip: ``model(..., evs_plans=[make_plan(...), ...])``.
    ``generate`` returns the unpruned prompt followed by the new tokens, as without EVS; ``forward`` returns logits of
    the tokens that stay (`last_plans` says which), and with labels the loss over them. Stopping criteria and logits
    processors see the pruned prompt.

    Args:
        model: A model of one of the classes in `CLASSES`, or a PEFT model of one.
        rate: Fraction of each clip's tokens to drop, 0 <= rate < 1.
        processor: The model's processor, or its video processor. From now on it hands on what clips looked like before
            it resized them (the field ``evs_cells``), which every selection but "paper" judges by, and which goes to
            the model with the rest of what the processor returns. It also says how pixels are normalised. By default
            that of an earlier call.
        served_positions: Also give prompts from which nothing is dropped (rate 0) the position IDs that vLLM gives.
            transformers resumes text after a long clip at other IDs; without this, rate 0 is the stock model bit for
            bit. For training.
        selection: How tokens are chosen: a name in `evs_vllm.core.scorers.SELECTIONS`, by default as a server does, or,
            for comparisons, an object, which calls cannot replace.
        encode: What runs the tower under encoder "reuse", by default `evs_vllm.hf.tower.encode`. For comparisons.
        **options: Further fields of `EVSConfig`: threshold, positions, min_tokens_per_unit, max_tokens, encoder,
            encoder_refresh, budget, stream (the clips of a call, which is then one conversation, are parts of one
            stream). The encoder is "full" by default; "reuse" has no backward pass.

    Returns:
        `model`.

    Raises:
        ConfigError: A value is not allowed.
        UnsupportedError: The model is of another class, something has wrapped its methods, its processor does not
            normalise, or transformers is too old.
    """
    base = base_of(model)
    name = type(base).__name__
    family = family_of(name)
    if name not in CLASSES or family is None:
        raise UnsupportedError(f"EVS for transformers supports {SUPPORTED}, not {name}.")
    if "mm_encoder_outputs" not in signature(type(base).forward).parameters:
        # Such a forward takes the argument among **kwargs and ignores it: answers as if there were no video.
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no mm_encoder_outputs in {name}.forward, which EVS hands the "
            "kept features to. Install transformers 5.18 or newer."
        )
    unknown = sorted({"request_overrides", "rate"} & set(options))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} cannot be given here.")
    own = selection if isinstance(selection, Selection) else None
    if selection is not None and own is None:
        options["selection"] = selection
    for method_name, method in _methods(base).items():
        if method_name in vars(base) and getattr(vars(base)[method_name], "__func__", None) is not method:
            raise UnsupportedError(
                f"{method_name} of this model is wrapped already, for example by accelerate. Call enable() before that."
            )
    config = EVSConfig.from_mapping({"rate": rate, **options, "request_overrides": "any"})
    stats, source = CLASSES[name].stats, None
    before: State | None = getattr(base, STATE, None)
    if processor is None and before is not None:
        processor = before.video_processor
    if processor is not None:
        source = getattr(processor, "video_processor", None) or processor
        if not (source.do_rescale and source.do_normalize):
            raise UnsupportedError("The processor must rescale and normalise pixels (do_rescale, do_normalize).")
        stats = PixelStats(tuple(source.image_mean), tuple(source.image_std))
        if before is not None and before.video_processor is not source:
            unwatch_processor(before.video_processor)
        watch_processor(source, with_cells=True)
    adapter = family.bind(base.config, stats=stats)
    setattr(base, STATE, State(resolved(config), adapter, own, encode, served_positions, source))
    for method_name, method in _methods(base).items():
        setattr(base, method_name, MethodType(method, base))
    return model


def disable(model: Any) -> Any:
    """Undoes `enable`, also what it told the processor; a model without EVS stays as it is.

    Returns:
        `model`.

    Raises:
        UnsupportedError: Something else has wrapped the model's ``forward`` since (for example accelerate).
    """
    base = base_of(model)
    state: State | None = getattr(base, STATE, None)
    if state is None:
        return model
    for name, ours in _methods(base).items():
        if getattr(getattr(base, name), "__func__", None) is not ours:
            raise UnsupportedError(f"{name} was wrapped by something else after enable(); unwrap that first.")
    for name in (*_methods(base), STATE):
        delattr(base, name)
    if state.video_processor is not None:
        unwatch_processor(state.video_processor)
    return model


def last_plans(model: Any) -> list[RetentionPlan]:
    """What the last call with clips kept, one plan per clip in the order of the batch."""
    return list(state_of(model).plans)


def last_batch(model: Any) -> Batch:
    """How the last call with clips shortened its batch: ``last_batch(model).take(labels, -100)`` fits its logits."""
    batch = state_of(model).batch
    if batch is None:
        raise UnsupportedError("The model was not called with clips since enable(), or nothing was asked of EVS.")
    return batch


def _methods(model: Any) -> dict[str, Callable[..., Any]]:
    cls: Any = type(model)
    return {"forward": pruning_forward(cls), "generate": pruning_generate(cls)}
