# SPDX-License-Identifier: Apache-2.0
"""Clips that another engine encodes: a consumer gets no pixels, so their plans come along with the request.

Of a request with media, an encoder instance (``--ec-transfer-config``) answers what vLLM's consumers need in its place:
each item's identifier and what sizes its placeholders, its grid for example. With `carry_plans` the plan is one of
those fields on both sides, so that a consumer lays out the prompt that the encoder's rows belong to.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from vllm.multimodal.parse import MultiModalDataParser

from evs_vllm.core.plan import BoolArray, RetentionPlan
from evs_vllm.engine.plan_field import MODALITY, PLAN_FIELD
from evs_vllm.errors import RequestError

CARRIED = frozenset({PLAN_FIELD, "second_per_grid_ts"})
"""What goes along beside vLLM's own fields: the plan, and the time by which some families count positions, without
which they would be other ones than in a single process."""


class _PlanCarrying(MultiModalDataParser):
    """Goes before a family's parser class."""

    @classmethod
    def placeholder_metadata_fields(cls, modality: str) -> set[str]:
        fields = super().placeholder_metadata_fields(modality)
        return fields | CARRIED if fields and modality == MODALITY else fields

    def embedding_field_sets(self, modality: str) -> tuple[set[str], set[str]]:
        required, optional = super().embedding_field_sets(modality)
        return required - CARRIED, optional  # clips that are not pruned have no plan

    def _parse_video_data(self, data: Any) -> Any:
        if not isinstance(data, Mapping) or PLAN_FIELD not in data:
            return super()._parse_video_data(data)
        rest = {name: value for name, value in data.items() if name != PLAN_FIELD}
        if not self.allow_missing_mm_embeddings or any("embeds" in name for name in rest):
            raise RequestError(
                f"A video's {PLAN_FIELD} stands for pixels that another engine encodes. Send it to a consumer "
                "(--ec-transfer-config or --kv-transfer-config), with what else the encoder answered and without "
                "embeddings; leave it out elsewhere."
            )
        items: Any = super()._parse_video_data(rest)
        plans = list(data[PLAN_FIELD])
        if len(plans) != items.get_count() or not all(_is_array(plan) for plan in plans):
            raise RequestError(f"Each of the {items.get_count()} videos needs one {PLAN_FIELD}, a list of integers.")
        # vLLM hands on what stands here field by field, also what it does not know.
        items.data = {**items.data, PLAN_FIELD: plans}
        return items


def _is_array(plan: Any) -> bool:
    return isinstance(plan, torch.Tensor) and plan.ndim == 1 and plan.dtype == torch.int64


@cache
def _parser_class(stock: type) -> type:
    return type(stock.__name__, (_PlanCarrying, stock), {"__module__": __name__, "__qualname__": stock.__name__})


def carry_plans(parser: MultiModalDataParser) -> None:
    """Lets videos without pixels that `parser` reads bring their plan, if its family takes such videos at all."""
    if not isinstance(parser, _PlanCarrying) and parser.placeholder_metadata_fields(MODALITY):
        stock: Any = type(parser)
        parser.__class__ = _parser_class(stock)


def brings_plans(items: Any) -> bool:
    """Whether vLLM's parsed videos of a request came with plans."""
    return isinstance(getattr(items, "data", None), Mapping) and PLAN_FIELD in items.data


def check_identifiers(uuids: Sequence[str | None] | None) -> None:
    """Refuses videos that came with plans and without the identifiers under which the encoder left their rows.

    Raises:
        RequestError: One has none. Its grid and plan do not tell it from another clip's.
    """
    if uuids is None or any(uuid is None for uuid in uuids):
        raise RequestError(
            "A video without pixels needs its identifier: send the key under which the encoder's ec_transfer_params "
            "hold it as the part's uuid."
        )


def given_plan(array: torch.Tensor, token_ids: Sequence[int], is_embed: BoolArray | None, span: Any) -> RetentionPlan:
    """The plan that came with a clip, checked against the prompt that this server would lay out without it.

    Args:
        array: As from `RetentionPlan.to_array`.
        token_ids, is_embed: The clip's unpruned placeholders here; None means that all take a row.
        span: From a grid in tokens to the position IDs that the unpruned clip takes up here.

    Raises:
        RequestError: It is no plan, or one for another prompt.
    """
    try:
        plan = RetentionPlan.from_array(array.numpy(), longest=len(token_ids))
    except ValueError as error:
        raise RequestError(f"The {PLAN_FIELD} of a video is damaged: {error}") from None
    layout = plan.layout
    assert layout is not None  # what is read from an array has one
    expected = span(plan.grid) if plan.positions == "keep" else plan.num_kept
    same = layout.token_ids.tolist() == list(token_ids)
    same = same and (bool(layout.is_embed.all()) if is_embed is None else layout.is_embed.tolist() == is_embed.tolist())
    if not same or plan.position_span != expected:
        raise RequestError(
            f"The {PLAN_FIELD} of a video was made for another prompt than its other fields say here. Send all fields "
            "as the encoder answered them, and start both engines with the same model and options."
        )
    return plan
