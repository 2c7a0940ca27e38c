# SPDX-License-Identifier: Apache-2.0
"""Puts a processor that plans in the place of a family's stock one, if EVS is on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from evs_vllm.engine.attached import settings_of
from evs_vllm.engine.processor import EVSProcessorMixin
from evs_vllm.families import Family
from evs_vllm.requests import refuse_keys


@cache
def processor_class(stock: type, family: Family) -> type:
    """`stock` with the mixin before it."""
    return type(f"EVS{stock.__name__}", (EVSProcessorMixin, stock), {"_evs_family": family})


def _refusing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of a stock processor, refusing the keys that Hugging Face's processor would ignore with a warning."""

    def checked(inputs: Any, timing_ctx: Any) -> Any:
        refuse_keys(inputs.hf_processor_mm_kwargs)
        return apply(inputs, timing_ctx)

    return checked


@dataclass(frozen=True)
class ProcessorFactory:
    """Builds the stock processor when EVS is off and ours when it is on. Put in place of the stock factory."""

    stock: Any
    family: Family

    def __call__(self, info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        if settings_of(info.ctx.model_config) is None:
            processor = self.stock(info, dummy_inputs, **kwargs)
            processor.apply = _refusing(processor.apply)
            return processor
        return processor_class(self.stock, self.family)(info, dummy_inputs, **kwargs)
