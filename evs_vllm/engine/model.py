# SPDX-License-Identifier: Apache-2.0
"""The model side, for any family: gather position IDs, keep embedding rows.

``getattr(this module, "<architecture>@<vLLM version>")`` makes the class; vLLM's registry holds such strings.
"""

import socket
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from vllm.model_executor.models.interfaces import supports_mrope
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.inputs import PlaceholderRange

from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.positions import PositionRequest, pruned_positions
from evs_vllm.core.prompt import ClipSpan
from evs_vllm.core.rows import encoder_batches, keep_rows
from evs_vllm.engine.attached import fingerprint_of, settings_of
from evs_vllm.engine.attention import wrap_tower
from evs_vllm.engine.compat import stock_model_class, widen_rotary_caches
from evs_vllm.engine.factory import ProcessorFactory
from evs_vllm.engine.plan_field import MODALITY, PLAN_FIELD, plan_of
from evs_vllm.errors import PlanError, UnsupportedError
from evs_vllm.families import Family, family_of
from evs_vllm.fingerprint import ID, fingerprint
from evs_vllm.options import CONFIG_KEY


def tower_is_elsewhere(model: Any) -> bool:
    """Whether a part of the model that is not its language model is missing in this process: on later pipeline stages,
    and where no media are served."""
    language = getattr(model, "_language_model_names", ())
    return any(isinstance(each, StageMissingLayer) for name, each in model.named_children() if name not in language)


class EVSModelMixin:
    """Goes before a family's model class. What carries no plan takes the stock path."""

    _evs_family: Family
    _evs_stock: type

    def __new__(cls, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
        wanted = CONFIG_KEY in (vllm_config.additional_config or {})
        if wanted and settings_of(vllm_config.model_config) is None:
            raise UnsupportedError(
                "EVS is on, but its settings did not reach the model config, so clips would be served unpruned. "
                "Please report how this engine was started."
            )
        if wanted:
            _check_fingerprint(vllm_config.model_config)
        if not wanted and cls.__dict__.get("_evs_stock") is not None:
            # Built whole and not an instance of cls, so Python does not call __init__ again.
            return _refusing_plans(cls._evs_stock(*args, vllm_config=vllm_config, **kwargs))
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        widen_rotary_caches()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._evs_encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        config: EVSConfig = settings_of(vllm_config.model_config) or EVSConfig()
        self._evs = self._evs_family.bind(vllm_config.model_config.hf_config)
        self._evs_tower = None if config.why_not_reuse or tower_is_elsewhere(self) else self._evs.reuse_tower(self)
        if self._evs_tower is not None:
            wrap_tower(self._evs_tower)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        stock = super().embed_multimodal  # type: ignore[misc]
        arrays = kwargs.pop(PLAN_FIELD, None)
        if arrays is None:
            return stock(**kwargs)
        plans = [RetentionPlan.from_array(array.numpy()) for array in arrays]
        kept: list[torch.Tensor] = []
        for start, stop in encoder_batches(plans, self._evs_encoder_tokens):
            batch = self._evs.select_clips(kwargs, plans, start, stop)
            if plans[start].encoder == "reuse":
                if self._evs_tower is None:
                    raise PlanError(
                        "A clip's plan has the vision tower reuse keys and values, which this worker cannot do. Start "
                        "all processes of a deployment with the same options."
                    )
                embeds = self._evs_tower.encode(batch, plans[start:stop])
                embeds = embeds.split([len(plan.computed) for plan in plans[start:stop]])
            else:
                embeds = stock(**batch)
            # vLLM's LLaVA-OneVision leaves an axis of length 1 in front when clips differ in length.
            kept += keep_rows([rows.flatten(0, -2) for rows in embeds], plans[start:stop])
        return tuple(kept)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        stock = super().get_mrope_input_positions  # type: ignore[misc]
        plans = [plan_of(feature.data) for feature in mm_features]
        if all(plan is None for plan in plans):
            return stock(input_tokens, mm_features)  # type: ignore[no-any-return]
        items = []
        for feature, plan in zip(mm_features, plans, strict=True):
            offset = feature.mm_position.offset
            items.append(PositionRequest(feature, offset, None if plan is None else ClipSpan(offset, plan)))
        return pruned_positions(input_tokens, items, _moved, stock)

    def get_encoder_cudagraph_config(self) -> Any:
        # A captured encoder bypasses embed_multimodal, so clips would come out unpruned; images keep their graph.
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=[m for m in config.modalities if m != MODALITY])


class OneAxisMixin:
    """Goes between the mixin and a model class with ordinary, 1-D RoPE, which vLLM does not ask for position IDs.

    With `compat.force_position_ids` it does, and hands them to the model as three equal rows. The language model gets
    one of them, as ever: its rotary embedding and the scaling of that are vLLM's own.
    """

    supports_mrope: ClassVar[Literal[True]] = True

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        return torch.arange(len(input_tokens)).repeat(3, 1), 0

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if positions.ndim == 2:
            positions = positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


def _check_fingerprint(model_config: Any) -> None:
    """Refuses to start a worker in another installation than that of the process that took the settings.

    Raises:
        UnsupportedError: They differ; the text says in what.
    """
    theirs = fingerprint_of(model_config) or {}
    ours = fingerprint(settings_of(model_config) or EVSConfig())
    if theirs.get(ID) == ours[ID]:
        return
    named = [
        f"{name} is {ours.get(name)!r} here and {theirs.get(name)!r} there"
        for name in dict.fromkeys((*ours, *theirs))
        if name != ID and ours.get(name) != theirs.get(name)
    ]
    raise UnsupportedError(
        f"This worker ({socket.gethostname()}) is not of one kind with the process that started the engine: "
        f"{'; '.join(named)}. Clips would be planned by one and encoded by the other. Install the same evs-vllm, vLLM, "
        "transformers and torch on all machines of a deployment."
    )


def _refusing_plans(model: Any) -> Any:
    """A stock model that does not take pruned clips for whole ones: its rows would be cut off in silence."""
    stock = model.embed_multimodal

    def embed_multimodal(**kwargs: Any) -> Any:
        if PLAN_FIELD in kwargs:
            raise UnsupportedError(
                "This worker was started without EVS and got a clip that was pruned elsewhere. Start all processes of "
                "a deployment, --headless ones too, with the same --evs-* options."
            )
        return stock(**kwargs)

    model.embed_multimodal = embed_multimodal
    return model


def _moved(item: PositionRequest, offset: int) -> Any:
    """The engine's description of `item` as it would be in the unpruned prompt."""
    feature: Any = item.feature
    if item.clip is None or item.clip.plan.layout is None:
        return replace(feature, mm_position=replace(feature.mm_position, offset=offset))
    layout = item.clip.plan.layout
    mask = None if layout.is_embed.all() else torch.from_numpy(layout.is_embed)
    return replace(feature, mm_position=PlaceholderRange(offset, len(layout.token_ids), mask))


@cache
def model_class(stock: type, family: Family) -> type:
    """`stock` with the mixin before it. It keeps the name, which vLLM compares in places."""
    body = {
        "__module__": __name__,
        "__qualname__": stock.__name__,
        "__doc__": stock.__doc__,
        "_evs_family": family,
        "_evs_stock": stock,
    }
    mixins = (EVSModelMixin,) if supports_mrope(stock) else (EVSModelMixin, OneAxisMixin)
    cls = type(stock.__name__, (*mixins, stock), body)
    factories = stock._processor_factory  # type: ignore[attr-defined]
    cls._processor_factory = replace(  # type: ignore[attr-defined]
        factories, processor=ProcessorFactory(factories.processor, family)
    )
    return cls


def __getattr__(name: str) -> type:
    architecture = name.split("@")[0]
    family = family_of(architecture)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(stock_model_class(architecture), family)
