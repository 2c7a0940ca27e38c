# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM that are wrapped or replaced, and every difference between its versions.

Each has its reason, and when it can go, in the ledger of all that we build on in vLLM: `evs_vllm.engine.touchpoints`.

0.32 and 0.33 need no difference so far: everything used here is the same in both. No engine of 0.33 was run.
"""

import argparse
import functools
import importlib
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import vllm
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs

from evs_vllm.engine.attached import settings_of
from evs_vllm.families.rotary import MROPE_CACHE_FACTOR

_WRAPPED = "__evs_wrapped__"

_REQUEST_CHECK = "validate_request_mm_kwargs"
_REQUEST_CHECK_HOME = "vllm.entrypoints.generate.base.protocol"
_SCHEDULER_HOME = "vllm.v1.core.sched.scheduler"
_BLOCK_KEYS = "_gen_mm_extra_hash_keys"
_BLOCK_KEYS_HOME = "vllm.v1.core.kv_cache_utils"
_ENGINE_CORE_HOME = "vllm.v1.engine.core"
_SESSION_HOME = "vllm.v1.engine.async_llm"
# They import it by name: those already loaded need the wrapped function, those loaded later get it from its home.
_REQUEST_CHECK_USERS = ("vllm.renderers.online_renderer", "vllm.entrypoints.pooling.base.serving")

_ROTARY_FACTOR = "mrope_positions_factor"
_ROTARY_FACTOR_HOME = "vllm.model_executor.models.qwen3_vl"
_ROTARY_FACTOR_USERS = ("vllm.model_executor.models.qwen3_vl_moe", "vllm.model_executor.models.qwen3_5")


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces the function `owner.name` by `make(function)`, once."""
    raw = owner.__dict__[name]
    original = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
    if getattr(original, _WRAPPED, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, type(raw)(wrapped) if isinstance(raw, (staticmethod, classmethod)) else wrapped)


def add_cli_options(add: Callable[[argparse.ArgumentParser], None]) -> None:
    """Calls `add(parser)` whenever vLLM builds its engine arguments."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_cli_args(parser: Any) -> Any:
            parser = original(parser)
            add(parser)
            return parser

        return add_cli_args

    _wrap(EngineArgs, "add_cli_args", make)


def wrap_from_cli_args(read: Callable[[argparse.Namespace], None]) -> None:
    """Calls `read(namespace)` before vLLM turns a parsed command line into engine arguments.

    The namespace itself is what vLLM pickles to further API servers, so changing it in place reaches them too.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
            read(args)
            return original(cls, args)

        return from_cli_args

    _wrap(EngineArgs, "from_cli_args", make)


def wrap_create_model_config(check: Callable[[Any, Any], None]) -> None:
    """Calls `check(engine_args, model_config)` on every new target model config."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_model_config(self: Any) -> Any:
            model_config = original(self)
            check(self, model_config)
            return model_config

        return create_model_config

    _wrap(EngineArgs, "create_model_config", make)


def wrap_create_engine_config(check: Callable[[Any], None]) -> None:
    """Calls `check(vllm_config)` on every new engine config: all options are settled in it."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            check(vllm_config)
            return vllm_config

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make)


def wrap_request_check(check: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Passes a request's ``mm_processor_kwargs`` through `check` before vLLM's own rule sees what is left of them."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate(*, mm_processor_kwargs: dict[str, Any] | None, **others: Any) -> None:
            if mm_processor_kwargs:
                mm_processor_kwargs = check(mm_processor_kwargs)
            original(mm_processor_kwargs=mm_processor_kwargs, **others)

        return validate

    home = importlib.import_module(_REQUEST_CHECK_HOME)
    _wrap(home, _REQUEST_CHECK, make)
    for name in _REQUEST_CHECK_USERS:
        if (module := sys.modules.get(name)) is not None:
            setattr(module, _REQUEST_CHECK, getattr(home, _REQUEST_CHECK))


def widen_rotary_caches() -> None:
    """Gives models that run with EVS the long cos/sin cache that vLLM's own pruning gets.

    Call it when the model's module is loaded and the model is not yet built. Models without EVS are not affected.
    """
    home = sys.modules.get(_ROTARY_FACTOR_HOME)
    if home is None:
        return  # a family that does not come from there, and has the long cache anyway

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def factor(vllm_config: Any) -> int:
            # A drafter gets the positions of its target.
            speculative = vllm_config.speculative_config
            target = (speculative and speculative.target_model_config) or vllm_config.model_config
            stock: int = original(vllm_config)
            return stock if settings_of(target) is None else max(stock, MROPE_CACHE_FACTOR)

        return factor

    _wrap(home, _ROTARY_FACTOR, make)
    for name in _ROTARY_FACTOR_USERS:
        if (module := sys.modules.get(name)) is not None:
            setattr(module, _ROTARY_FACTOR, getattr(home, _ROTARY_FACTOR))


def wrap_preprocess_add_request(check: Callable[[Any], None]) -> None:
    """Calls `check(request)` on each request that comes to an engine core whose model config has our settings.

    What it raises ends that request alone; from where `wrap_add_request` calls, it would end the engine.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            prepared = original(self, request)
            if settings_of(self.vllm_config.model_config) is not None:
                check(prepared[0])
            return prepared

        return preprocess_add_request

    _wrap(importlib.import_module(_ENGINE_CORE_HOME).EngineCore, "preprocess_add_request", make)


def wrap_add_request(check: Callable[[Any, Any], None]) -> None:
    """Calls `check(model_config, request)` on each new request of an engine core whose model config has our settings.

    Of a session it is called again whenever an input was added to its request.

    Imports the scheduler, so call it where that will be needed anyway or EVS is on.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any) -> None:
            if settings_of(self.vllm_config.model_config) is not None:
                check(self.vllm_config.model_config, request)
            original(self, request)

        return add_request

    def make_update(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_request_as_session(self: Any, session: Any, update: Any) -> None:
            original(self, session, update)
            if settings_of(self.vllm_config.model_config) is not None:
                check(self.vllm_config.model_config, session)

        return update_request_as_session

    scheduler = importlib.import_module(_SCHEDULER_HOME).Scheduler
    _wrap(scheduler, "add_request", make)
    _wrap(scheduler, "_update_request_as_session", make_update)


def wrap_session_input(admit: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
    """Awaits `admit(engine, request, collector)` before each input of a session of an `AsyncLLM` with our settings.

    `request` is what the input was made into, and `collector` is the session's own, as long as it lasts.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def add_request(self: Any, request: Any, prompt: Any, parent_req: Any, index: int, queue: Any) -> None:
            if request.resumable and settings_of(self.model_config) is not None:
                await admit(self, request, queue)
            await original(self, request, prompt, parent_req, index, queue)

        return add_request

    _wrap(importlib.import_module(_SESSION_HOME).AsyncLLM, "_add_request", make)


def wrap_block_keys(name: Callable[[Any, int, int], str | None]) -> None:
    """Has vLLM's prefix cache name a block that ends within a multimodal item by ``name(request, item's number, end)``.

    Where that is None, and for every other block, vLLM's own names stand. Imports the module, so call it where that
    will be needed anyway or EVS is on.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> tuple[list[Any], int]:
            found, number = original(request, start_token_idx, end_token_idx, start_mm_idx)
            # The item that it would look at next is the one in which the block ends, if it ends in one.
            within = found and 0 <= number < len(request.mm_features)
            if within and (instead := name(request, number, end_token_idx)) is not None:
                tag, _, offset = found[-1]
                found[-1] = (tag, instead, offset)
            return found, number

        return keys

    _wrap(importlib.import_module(_BLOCK_KEYS_HOME), _BLOCK_KEYS, make)


def may_run_engine_core() -> bool:
    """Whether this process has imported vLLM's engine core; one that runs it has when it loads plugins.

    It imports its scheduler later, when it knows which.
    """
    return _ENGINE_CORE_HOME in sys.modules


def force_position_ids(model_config: Any) -> None:
    """Makes vLLM ask the model class for the position IDs of each prompt, if it does not do so already.

    The attribute of the outer config switches that on and nothing else: in ``rope_parameters`` it would choose another
    rotary embedding, for some scalings (default, yarn) and not for others. The language model gets its own sub-config.
    """
    if not model_config.uses_mrope:
        model_config.hf_config.mrope_section = [model_config.get_head_size() // 2, 0, 0]


def guard_llvmlite_getattr() -> None:
    """Makes llvmlite's library wrapper deny special attributes such as ``__dict__``, as other objects do."""
    wrapper: Any = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
    if getattr(wrapper.__getattr__, _WRAPPED, False):
        return
    original = wrapper.__getattr__

    def get(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    setattr(get, _WRAPPED, True)
    wrapper.__getattr__ = get


_stock: dict[str, tuple[str, str]] = {}


def stock_model_class(architecture: str) -> type:
    """The class that vLLM itself has for `architecture`."""
    module, name = _stock[architecture]
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def replace_model_class(architecture: str, module: str) -> bool:
    """Registers ``module:<architecture>@<vLLM version>`` in place of vLLM's class; `stock_model_class` finds that.

    The version is in the name because vLLM caches what it learned of a class on disk by that name and the hash of the
    module's file, and our file does not change when vLLM does.

    Returns:
        Whether this vLLM has the architecture.
    """
    if architecture in _stock:
        return True
    entry = ModelRegistry.models.get(architecture)
    if entry is None or not hasattr(entry, "module_name"):
        return False
    _stock[architecture] = (entry.module_name, entry.class_name)
    ModelRegistry.register_model(architecture, f"{module}:{architecture}@{vllm.__version__}")
    return True
