# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process: it adds the ``--evs-*`` flags and registers the families.

It runs before any configuration is known, so it changes nothing by itself: with EVS not asked for, the registered
classes give way to vLLM's own and the flags are unset.
"""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from evs_vllm import envs
from evs_vllm.config import EVSConfig
from evs_vllm.errors import ConfigError, UnsupportedError
from evs_vllm.families import WHY_NOT_CAUSAL, family_of, supported_architectures
from evs_vllm.families.refused import refusal_of
from evs_vllm.fingerprint import ID, fingerprint
from evs_vllm.options import CONFIG_KEY, OPTIONS
from evs_vllm.requests import admit, refuse_keys, split_request_kwargs
from evs_vllm.versions import tested_range, version_is_tested

# A child of vLLM's logger, so that its handler and level apply.
logger = logging.getLogger("vllm.evs_vllm")

# The settings of the engine that this API server process serves; the request check has no other way to them.
_server_config: EVSConfig | None = None


def register() -> None:
    """Registers EVS with vLLM. Called in every process, possibly more than once."""
    from evs_vllm.engine import compat

    compat.add_cli_options(_add_cli_options)
    compat.wrap_from_cli_args(_read_cli_options)
    compat.wrap_create_model_config(_start)
    compat.wrap_create_engine_config(_check_engine)
    if compat.may_run_engine_core():
        compat.wrap_add_request(_cap_answer_length)
        compat.wrap_preprocess_add_request(_check_plans)
        compat.wrap_block_keys(_block_key)
    for architecture in supported_architectures():
        compat.replace_model_class(architecture, "evs_vllm.engine.model")


def _add_cli_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("EVS", "Efficient Video Sampling: drop video tokens that did not change.")

    for option in OPTIONS:
        option.add_to(group)


def _read_cli_options(args: argparse.Namespace) -> None:
    from evs_vllm.engine import compat

    compat.wrap_request_check(_check_request)
    given = {o.name: value for o in OPTIONS if (value := getattr(args, o.request_key, None)) is not None}
    if not given:
        return
    extra = getattr(args, "additional_config", None) or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"--additional-config must be a JSON object to be used with --evs-* options, got {extra!r}.")
    EVSConfig.from_mapping({**extra.get(CONFIG_KEY, {}), **given})
    args.additional_config = {**extra, CONFIG_KEY: {**extra.get(CONFIG_KEY, {}), **given}}


def _start(engine_args: Any, model_config: Any) -> None:
    """Checks that EVS can do what was asked for, and hands the settings on."""
    global _server_config
    from evs_vllm.engine import allowed, attached, compat

    compat.wrap_request_check(_check_request)
    extra = engine_args.additional_config
    if not isinstance(extra, Mapping) or CONFIG_KEY not in extra:
        _server_config = None
        return
    config = EVSConfig.from_mapping(extra[CONFIG_KEY])
    if not version_is_tested(compat.vllm.__version__) and not envs.allow_untested_vllm():
        raise UnsupportedError(
            f"evs-vllm was tested with vLLM {tested_range()}, this is {compat.vllm.__version__}. Install one of "
            "those, or set EVS_ALLOW_UNTESTED_VLLM=1 to try."
        )
    architecture = model_config.architecture
    family = family_of(architecture)
    if family is None or model_config.multimodal_config is None:
        refused = refusal_of(architecture)
        why = f" {'yet' if refused.fits else 'and cannot'}: {refused.reason}" if refused else ""
        raise UnsupportedError(
            f"EVS does not support {architecture} ({model_config.model}){why}. Supported: "
            f"{', '.join(supported_architectures())}. Drop the --evs-* options to serve it unpruned."
        )
    if config.budget == "causal" and not family.grows:
        raise UnsupportedError(f"--evs-budget causal is not possible here: {WHY_NOT_CAUSAL} Leave it out.")
    allowed.refuse_conflicts(engine_args, model_config)
    adapter = family.bind(model_config.hf_config)
    if why := adapter.unsupported_kwargs(model_config.multimodal_config.mm_processor_kwargs or {}):
        raise UnsupportedError(
            f"EVS cannot prune video with these --mm-processor-kwargs: {why}. Leave that out, or drop the "
            "--evs-* options."
        )
    config = config.resolve_encoder(adapter.why_not_reuse() or allowed.why_not_reuse(engine_args, model_config))
    parts = fingerprint(config)
    attached.attach_settings(model_config, config, parts)
    compat.force_position_ids(model_config)
    compat.wrap_add_request(_cap_answer_length)
    compat.wrap_preprocess_add_request(_check_plans)
    compat.wrap_session_input(_admit_session_input)
    compat.wrap_block_keys(_block_key)
    _server_config = config
    _show_fingerprint(parts)
    _compile_kernels(on_gpu=allowed.clips_arrive_on_gpu(engine_args, model_config))
    logger.info(
        "EVS (evs-vllm) for %s: drops %s; request overrides: %s; fingerprint %s.",
        family.name,
        config.describe(),
        config.request_overrides,
        parts[ID],
    )


def _check_engine(vllm_config: Any) -> None:
    """Checks what is known only of the whole engine."""
    from evs_vllm.engine import allowed, attached

    model_config = vllm_config.model_config
    config: EVSConfig | None = attached.settings_of(model_config)
    if config is None:
        return
    if why := allowed.why_not_keep(vllm_config):
        if config.positions == "keep":
            raise UnsupportedError(
                f"--evs-positions keep is not possible here: {why} Set --evs-positions sequential, drop speculation or "
                "use a method without a draft model, such as ngram."
            )
        attached.forbid_keep(model_config, why)


def _show_fingerprint(parts: dict[str, str]) -> None:
    from evs_vllm.engine.metrics import show_fingerprint

    show_fingerprint(parts)


def _cap_answer_length(model_config: Any, request: Any) -> None:
    from evs_vllm.engine.limits import cap_answer_length

    cap_answer_length(model_config, request)


def _check_plans(request: Any) -> None:
    from evs_vllm.engine.limits import check_plans

    check_plans(request)


async def _admit_session_input(engine: Any, request: Any, collector: Any) -> None:
    from evs_vllm.engine.sessions import admit_input

    await admit_input(engine, request, collector)


def _block_key(request: Any, number: int, end: int) -> str | None:
    from evs_vllm.engine.beginnings import block_key

    return block_key(request, number, end)


def _compile_kernels(on_gpu: bool) -> None:
    """Compiles before the first request what the first request will need; `on_gpu` if clips may be there."""
    import evs_kernels
    from evs_vllm.engine import compat

    evs_kernels.warmup()
    if on_gpu:
        _try_gpu()
    compat.guard_llvmlite_getattr()


def _try_gpu() -> None:
    """Compiles for the GPU on which this process's clips are, and says whether their pixels are made there."""
    import torch

    import evs_kernels
    from evs_vllm.families.front_end import why_not_on

    device = torch.device("cuda", torch.cuda.current_device())
    evs_kernels.warmup(device=device)
    why = why_not_on(device)
    logger.info("EVS: pixels of clips on %s are made %s.", device, f"by the processor: {why}" if why else "there")


def _check_request(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Judges a request's ``evs_*`` keys and returns the others, which stay under vLLM's own rule."""
    ours, rest = split_request_kwargs(kwargs)
    if not ours:
        return kwargs
    if _server_config is None:
        refuse_keys(ours)
    else:
        admit(_server_config, ours)
    return rest
