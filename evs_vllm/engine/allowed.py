# SPDX-License-Identifier: Apache-2.0
"""What an engine's other options allow: what EVS cannot work beside, and what it cannot do there."""

from typing import Any

import vllm
from vllm.platforms import current_platform

from evs_vllm.errors import UnsupportedError
from evs_vllm.options import REQUEST_PREFIX


def refuse_conflicts(engine_args: Any, model_config: Any) -> None:
    """Refuses vLLM options that EVS cannot work beside.

    Raises:
        UnsupportedError: Stock pruning, the Rust frontend, LoRA in the vision tower, or evs keys among the server's
            ``mm_processor_kwargs``.
    """
    mm_config = model_config.multimodal_config
    if mm_config.video_pruning_rate:
        raise UnsupportedError(
            f"--video-pruning-rate {mm_config.video_pruning_rate} and the --evs-* options both prune video. "
            "Drop one of them."
        )
    if vllm.envs.VLLM_USE_RUST_FRONTEND:
        raise UnsupportedError(
            "The Rust frontend (VLLM_USE_RUST_FRONTEND=1) does not run the Python processor that EVS works in, so "
            "clips would be served unpruned. Unset it, or drop the --evs-* options."
        )
    if engine_args.enable_tower_connector_lora:
        # GPUModelRunner._execute_mm_encoder maps rows to adapters once for all items of a step, while EVS encodes clips
        # of different settings in calls of their own: the second would get the adapters of the first.
        raise UnsupportedError(
            "With --enable-tower-connector-lora and EVS, clips could be encoded with another request's adapter. Drop "
            "one of them; LoRA adapters of the language model work."
        )
    ours = sorted(key for key in mm_config.mm_processor_kwargs or {} if str(key).startswith(REQUEST_PREFIX))
    if ours:
        raise UnsupportedError(
            f"--mm-processor-kwargs holds {', '.join(ours)}, which are keys for requests. "
            "Set the server's own values with the --evs-* options."
        )


def why_not_reuse(engine_args: Any, model_config: Any) -> str:
    """Why the vision tower cannot reuse keys and values under these vLLM options, or ""."""
    mm_config = model_config.multimodal_config
    if mm_config.mm_encoder_tp_mode == "data":
        return "--mm-encoder-tp-mode data shards whole clips over ranks."
    if mm_config.mm_encoder_attn_dtype is not None:
        return f"--mm-encoder-attn-dtype {mm_config.mm_encoder_attn_dtype} has no reuse path."
    if getattr(engine_args.compilation_config, "compile_mm_encoder", False):
        return "compile_mm_encoder compiles the tower's stock attention."
    return ""


def why_not_keep(vllm_config: Any) -> str:
    """Why this engine cannot work with kept positions, or ""."""
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.uses_draft_kv_cache() or vllm_config.use_v2_model_runner:
        return ""
    return (
        f"with speculative method {speculative.method!r}, vLLM's first model runner, which this engine uses, takes "
        "position IDs for places in the draft model's KV cache, and kept positions run ahead of them, possibly past "
        "the end of the draft's rotary table."
    )


def clips_arrive_on_gpu(engine_args: Any, model_config: Any) -> bool:
    """Whether frames of clips may be on the GPU in an API server when they are judged."""
    mm_config = model_config.multimodal_config
    if current_platform.device_type != "cuda":
        return False
    asked = mm_config.get_mm_processor_device_type()
    if asked is not None:  # the processor moves them there, wherever they were decoded
        return asked == "cuda"
    decoded_on = str((mm_config.media_io_kwargs or {}).get("video", {}).get("device", ""))
    # Of an encode-only engine vLLM decides later, by the transport.
    encode_only = engine_args.ec_transfer_config is not None and engine_args.ec_transfer_config.is_encode_only
    return decoded_on.startswith("cuda") or (encode_only and mm_config.mm_tensor_ipc == "torch_shm")
