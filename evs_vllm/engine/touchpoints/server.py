# SPDX-License-Identifier: Apache-2.0
"""What starting an engine and serving requests build on."""

from evs_vllm.engine.touchpoints.row import PROCESSORS, PUBLIC, TOWERS, Touchpoint

ROWS: tuple[Touchpoint, ...] = (
    Touchpoint(
        what="flags are added (compat.add_cli_options)",
        where="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=("parser",),
        why="``vllm serve`` has no hook for a plugin's flags; it loads general plugins just before this.",
        gone_when="vLLM lets plugins add arguments.",
    ),
    Touchpoint(
        what="general plugins are loaded before flags are added",
        where="vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
        source=("load_general_plugins()", "EngineArgs.add_cli_args(parser)"),
        why="``register`` must have wrapped `EngineArgs.add_cli_args` by then.",
        gone_when="vLLM lets plugins add arguments.",
    ),
    Touchpoint(
        what="flags are read (compat.wrap_from_cli_args)",
        where="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        parameters=("cls", "args"),
        why=(
            "Our flags move into ``additional_config`` before engine arguments are made; the namespace is what "
            "further API servers get."
        ),
        gone_when="vLLM lets plugins add arguments.",
    ),
    Touchpoint(
        what="settings reach processors (compat.wrap_create_model_config)",
        where="vllm.engine.arg_utils:EngineArgs.create_model_config",
        parameters=("self",),
        why=(
            "Processors see only ``ModelConfig``, ``additional_config`` is in ``VllmConfig``: settings are attached "
            "to the former."
        ),
        gone_when="Processors can read ``additional_config``.",
    ),
    Touchpoint(
        what="engines are checked (compat.wrap_create_engine_config)",
        where="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        accepts=("self",),
        why="Only ``VllmConfig`` says which runner and which roles an engine has; what cannot work is refused.",
        gone_when="vLLM lets a plugin check an engine's config.",
    ),
    Touchpoint(
        what="encode-only engines are known (allowed.clips_arrive_on_gpu)",
        where="vllm.config.ec_transfer:ECTransferConfig",
        attributes=("is_encode_only",),
        why="They may have pixels on the GPU.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="plans go to consumers (handover.carry_plans)",
        where="vllm.distributed.ec_transfer.ec_connector.utils:PlaceholderMetadataResolver.fields_for",
        source=("create_processor(", ".info", "data_parser.placeholder_metadata_fields("),
        why="An encoder answers the fields that the data parser of its processor names, so the plan is one of them.",
        gone_when="A plan travels with a clip's embeddings.",
    ),
    Touchpoint(
        what="plans come to consumers (handover.carry_plans)",
        where="vllm.renderers.chat_utils:_get_embeds_data",
        source=("data_parser.placeholder_metadata_fields(", "_merge_embeds("),
        why="A chat request may hold those fields as lists of numbers.",
        gone_when="A plan travels with a clip's embeddings.",
    ),
    Touchpoint(
        what="plans come to consumers (handover.given_plan)",
        where="vllm.config.vllm:VllmConfig._resolve_mm_embedding_inputs",
        source=("is_ec_consumer", "is_kv_consumer", "allow_missing_mm_embeddings"),
        why="These roles decide whether a request may come without pixels.",
        gone_when="A plan travels with a clip's embeddings.",
    ),
    Touchpoint(
        what="drafts read positions as places (allowed.why_not_keep)",
        where="vllm.config.speculative:SpeculativeConfig",
        attributes=("method", "uses_draft_kv_cache"),
        why="Methods with a KV cache of their own number its places by position IDs on the first runner.",
        gone_when="vLLM counts a draft's places without position IDs.",
    ),
    Touchpoint(
        what="drafts read positions as places (allowed.why_not_keep)",
        where="vllm.v1.spec_decode.llm_base_proposer",
        source=("positions = positions[0]",),
        why="The reason to refuse kept positions there.",
        gone_when="vLLM counts a draft's places without position IDs.",
    ),
    Touchpoint(
        what="drafts count places by themselves (allowed.why_not_keep)",
        where="vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator",
        source=("input_batch.positions",),
        why="On the second runner a draft gets places, not position IDs, so kept positions are allowed there.",
        gone_when="vLLM counts a draft's places without position IDs.",
    ),
    Touchpoint(
        what="engine arguments are read (plugin._start, allowed.refuse_conflicts)",
        where="vllm.engine.arg_utils:EngineArgs",
        attributes=("additional_config", "enable_tower_connector_lora", "compilation_config", "ec_transfer_config"),
        why="They hold the settings, and options that EVS cannot work beside.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="compiled towers are not reused (compat.reuse_obstacle)",
        where="vllm.config.compilation:CompilationConfig",
        attributes=("compile_mm_encoder",),
        why="A compiled tower runs its stock attention.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="model configs are read and changed (compat, limits)",
        where="vllm.config.model:ModelConfig",
        attributes=(
            "architecture",
            "hf_config",
            "max_model_len",
            "model",
            "multimodal_config",
            "uses_mrope",
            "get_head_size",
        ),
        why="It says which model is served and how long its context is, and carries the settings.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="multimodal configs are read (compat, limits, inspect)",
        where="vllm.config.multimodal:MultiModalConfig",
        attributes=(
            "video_pruning_rate",
            "mm_processor_kwargs",
            "mm_processor_cache_type",
            "mm_encoder_tp_mode",
            "mm_encoder_attn_dtype",
            "media_io_kwargs",
            "mm_tensor_ipc",
            "get_mm_processor_device_type",
        ),
        why=(
            "Its options decide what EVS can do; it also carries the settings where a model config is made anew from "
            "it."
        ),
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="the engine's config is read (model.EVSModelMixin)",
        where="vllm.config.vllm:VllmConfig",
        attributes=(
            "additional_config",
            "model_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        why="A model class learns from it whether EVS is on.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="encoder batches are bounded (model.EVSModelMixin)",
        where="vllm.config.scheduler:SchedulerConfig",
        attributes=("max_num_encoder_input_tokens",),
        why=(
            "The scheduler charges pruned clips to a budget for whole ones, so more reach the tower at once than it "
            "has memory for."
        ),
        gone_when="vLLM charges a clip what its tower computes.",
    ),
    Touchpoint(
        what="the frontend is checked (allowed.refuse_conflicts)",
        where="vllm.envs",
        attributes=("VLLM_USE_RUST_FRONTEND",),
        why="The Rust frontend runs no Python processor.",
        gone_when="The Rust frontend runs plugins.",
    ),
    Touchpoint(
        what="the version is read (compat.replace_model_class)",
        where="vllm",
        attributes=("__version__", "ModelRegistry"),
        why="Untested versions are refused, and cached facts of a class are kept apart by version.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="logging as vLLM's (processor)",
        where="vllm.logger:init_logger",
        accepts=("name",),
        why="For warnings that appear once, in vLLM's format.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="logging once (processor)",
        where="vllm.logger:_VllmLogger",
        attributes=("warning_once",),
        why="A warning for each clip would flood the log.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="request keys are checked (compat.wrap_request_check)",
        where="vllm.entrypoints.generate.base.protocol:validate_request_mm_kwargs",
        parameters=("mm_processor_kwargs", "media_io_kwargs", "trust_request_mm_kwargs"),
        why="vLLM refuses all request-level ``mm_processor_kwargs`` unless all are trusted.",
        gone_when="A processor can name keys that are safe for untrusted requests.",
    ),
    Touchpoint(
        what="request keys are checked (compat.wrap_request_check)",
        where="vllm.renderers.online_renderer",
        attributes=("validate_request_mm_kwargs",),
        why="It imports the function by name, so the name there is replaced too.",
        gone_when="A processor can name keys that are safe for untrusted requests.",
    ),
    Touchpoint(
        what="request keys are checked (compat.wrap_request_check)",
        where="vllm.entrypoints.pooling.base.serving",
        attributes=("validate_request_mm_kwargs",),
        why="It imports the function by name, so the name there is replaced too.",
        gone_when="A processor can name keys that are safe for untrusted requests.",
    ),
    Touchpoint(
        what="plans are read on arrival (compat.wrap_preprocess_add_request)",
        where="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        parameters=("self", "request"),
        results=2,
        why="A plan that cannot be read has to end its request and not the engine.",
        gone_when="A plugin can check a request where it comes to the engine core.",
    ),
    Touchpoint(
        what="plans are read on arrival (compat.wrap_preprocess_add_request)",
        where="vllm.v1.engine.core:EngineCore",
        attributes=("vllm_config",),
        why="Its model config tells whether EVS is on.",
        gone_when="A plugin can check a request where it comes to the engine core.",
    ),
    Touchpoint(
        what="answers end in time (compat.wrap_add_request)",
        where="vllm.v1.core.sched.scheduler:Scheduler.add_request",
        parameters=("self", "request"),
        why="The scheduler ends an answer by its tokens, while the positions of a pruned prompt are further along.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="answers end in time (compat.wrap_add_request)",
        where="vllm.v1.core.sched.scheduler:Scheduler",
        attributes=("vllm_config",),
        why="Its model config tells whether EVS is on.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="answers end in time (limits.cap_answer_length)",
        where="vllm.v1.request:Request",
        attributes=("mm_features", "num_prompt_tokens", "max_tokens"),
        why="The length of an answer is bounded by changing the request.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="blocks of a clip are named by its beginning (compat.wrap_block_keys)",
        where="vllm.v1.core.kv_cache_utils:_gen_mm_extra_hash_keys",
        parameters=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        results=2,
        source=(
            "while mm_features and curr_mm_idx < len(mm_features):",
            'extra_keys.append(("mm", mm_feature.identifier, offset - start_token_idx))',
            "if end_token_idx >= offset + length:",
            "return extra_keys, curr_mm_idx",
        ),
        why=(
            "With the causal budget a clip that has grown must find its beginning in the prefix cache, and vLLM names "
            "all blocks of a clip by the whole clip. The last key, and the item that is returned, are those of the "
            "item in which a block ends."
        ),
        gone_when="vLLM lets an item name its beginning, or lets a plugin name blocks.",
    ),
    Touchpoint(
        what="blocks of a clip are named by its beginning (compat.wrap_block_keys)",
        where="vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        source=("_gen_mm_extra_hash_keys(",),
        why="All that names blocks calls it, and it finds the function in its module.",
        gone_when="vLLM lets an item name its beginning, or lets a plugin name blocks.",
    ),
    Touchpoint(
        what="blocks of a clip are named by its beginning (beginnings.block_key)",
        where="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        source=("get_and_update_features(", "Request.from_engine_core_request("),
        why="An item's fields, with the plan, must be there before a request names its blocks.",
        gone_when="vLLM lets an item name its beginning, or lets a plugin name blocks.",
    ),
    Touchpoint(
        what="answers end in time (limits.cap_answer_length)",
        where="vllm.v1.core.sched.utils:check_stop",
        source=("request.max_tokens",),
        why="The scheduler reads the bound from the request, at each step.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="engine cores are known (compat.may_run_engine_core)",
        where="vllm.v1.engine.core:EngineCore.__init__",
        source=("load_general_plugins()", "get_scheduler_cls()"),
        why="A process that runs one has this module loaded when it loads plugins, and imports its scheduler later.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="plans lose nothing in the engine core (plan_field)",
        where="vllm.multimodal.utils:strip_covered_mm_data",
        source=("keep_on_cpu",),
        why="On prefix-cache hits only fields that stay on the CPU survive, so the plan is one of those.",
        gone_when=PROCESSORS,
    ),
)
