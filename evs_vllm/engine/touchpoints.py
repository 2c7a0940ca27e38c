# SPDX-License-Identifier: Apache-2.0
"""The ledger: everything of vLLM (and llvmlite) that this package builds on, why, and when that can go.

``tests/plugin/test_touchpoints.py`` compares each row with the vLLM that is installed. With a new version of vLLM, begin
there: what a red row says in `why` is what has to be looked at, before any engine starts.

0.32 and 0.33 need no difference so far: everything used here is the same in both. No engine of 0.33 was run.
"""

from dataclasses import dataclass

from evs_vllm.engine.installed import find

PUBLIC = "Stays: it is vLLM's interface for others."
TOWERS = "vLLM's towers take row orders and sequence boundaries of any queries and keys by a documented call."
PROCESSORS = "vLLM lets a plugin change a processor's placeholders, fields and cache keys."


@dataclass(frozen=True, kw_only=True)
class Touchpoint:
    """One thing that this package builds on.

    Attributes:
        what: What is done with it, and by which of our functions.
        where: "module:Qualified.name", or a module.
        parameters: All parameters of the function, because we wrap it, override it or stand in for it.
        accepts: Parameters of the function that we pass, among others.
        attributes: Names in the module, or of the class and its instances.
        source: What its source says: facts that are in no signature.
        why: What needs it, so what breaks without it.
        gone_when: When the row can go.
    """

    what: str
    where: str
    parameters: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    why: str
    gone_when: str


def missing(touchpoint: Touchpoint) -> str:
    """What the installed packages lack of a touchpoint, or ""."""
    found = find(touchpoint.where)
    if found is None:
        return f"{touchpoint.where} is gone"
    parameters = found.parameters() or ()
    if touchpoint.parameters and touchpoint.parameters != parameters:
        return f"{touchpoint.where} takes ({', '.join(parameters)}), not ({', '.join(touchpoint.parameters)})"
    if lost := [name for name in touchpoint.accepts if name not in parameters]:
        return f"{touchpoint.where} does not take {', '.join(lost)}"
    if touchpoint.attributes and (lost := sorted(set(touchpoint.attributes) - found.attributes())):
        return f"{touchpoint.where} has no {', '.join(lost)}"
    if touchpoint.source and (lost := [text for text in touchpoint.source if text not in found.source()]):
        return f"{touchpoint.where} no longer says {', '.join(map(repr, lost))}"
    return ""


TOUCHPOINTS: tuple[Touchpoint, ...] = (
    # --- starting an engine ---
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
        what="engine arguments are read (plugin._start, compat.refuse_conflicts)",
        where="vllm.engine.arg_utils:EngineArgs",
        attributes=("additional_config", "enable_tower_connector_lora", "compilation_config"),
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
        attributes=("additional_config", "model_config", "scheduler_config", "speculative_config"),
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
        what="the frontend is checked (compat.refuse_conflicts)",
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
    # --- model classes ---
    Touchpoint(
        what="model classes are replaced (compat.replace_model_class)",
        where="vllm.model_executor.models.registry:_ModelRegistry.register_model",
        parameters=("self", "model_arch", "model_cls"),
        why='The way for a plugin to serve an architecture with a class of its own, given as "module:Class".',
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="stock classes are found (compat.stock_model_class)",
        where="vllm.model_executor.models.registry:_ModelRegistry",
        attributes=("models",),
        why="Our class has vLLM's as its base, and EVS off means vLLM's.",
        gone_when="vLLM says what an architecture was registered to.",
    ),
    Touchpoint(
        what="stock classes are found (compat.stock_model_class)",
        where="vllm.model_executor.models.registry:_LazyRegisteredModel",
        attributes=("module_name", "class_name"),
        source=("self.class_name", "getattr(mod, self.class_name)"),
        why="Entries name the module and the class.",
        gone_when="vLLM says what an architecture was registered to.",
    ),
    Touchpoint(
        what="facts of a class are cached (compat.replace_model_class)",
        where="vllm.model_executor.models.registry:_LazyRegisteredModel._get_cache_filename",
        source=("self.module_name", "self.class_name"),
        why=(
            "The version is in the name of our classes: the cache knows a class by that and the hash of its module's "
            "file."
        ),
        gone_when="vLLM's own version is part of that cache's key.",
    ),
    Touchpoint(
        what="video embeddings are pruned (model.EVSModelMixin.embed_multimodal)",
        where="vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
        parameters=("self", "**kwargs"),
        why="Rows of dropped tokens leave here, once for both runners.",
        gone_when="vLLM lets a plugin choose embedding rows.",
    ),
    Touchpoint(
        what="positions are gathered (model.EVSModelMixin.get_mrope_input_positions)",
        where="vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions",
        parameters=("self", "input_tokens", "mm_features"),
        why="Kept tokens keep the positions of the unpruned prompt.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="1-D models say that they number prompts (model.OneAxisMixin)",
        where="vllm.model_executor.models.interfaces:SupportsMRoPE",
        attributes=("supports_mrope",),
        why="Runners ask only such models for positions.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="M-RoPE is asked for (model.model_class)",
        where="vllm.model_executor.models.interfaces:supports_mrope",
        parameters=("model",),
        why="1-D models get another mixin.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="runner V1 asks for positions (model)",
        where="vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        source=("get_mrope_input_positions(", "self.uses_mrope"),
        why="It takes three rows of positions and a delta from the model.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="runner V2 asks for positions (model)",
        where="vllm.v1.worker.gpu.mm.rope",
        source=("isinstance(model, SupportsMRoPE)", "get_mrope_input_positions("),
        why="It takes three rows of positions and a delta from the model.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="1-D models are asked for positions (compat.force_position_ids)",
        where="vllm.transformers_utils.config:_mrope_section",
        source=('"mrope_section"', "getattr_iter(config, names", "isinstance(section, (list, tuple))"),
        why="An attribute of the outer config switches that on and nothing else.",
        gone_when="Any model may number its prompt.",
    ),
    Touchpoint(
        what="features are described anew (model._moved)",
        where="vllm.multimodal.inputs:MultiModalFeatureSpec",
        attributes=("data", "mm_position"),
        why="Models get items as they stood in the unpruned prompt; the plan is among an item's fields.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="features are described anew (model._moved)",
        where="vllm.multimodal.inputs:PlaceholderRange",
        attributes=("offset", "length", "is_embed"),
        why="Models get items as they stood in the unpruned prompt.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="videos leave the encoder's CUDA graphs (model.EVSModelMixin)",
        where="vllm.model_executor.models.interfaces:SupportsEncoderCudaGraph.get_encoder_cudagraph_config",
        parameters=("self",),
        why="A captured encoder goes past embed_multimodal, so clips would come out unpruned.",
        gone_when="Captured encoders select rows.",
    ),
    Touchpoint(
        what="videos leave the encoder's CUDA graphs (model.EVSModelMixin)",
        where="vllm.v1.worker.encoder_cudagraph_defs:EncoderCudaGraphConfig",
        attributes=("modalities",),
        why="It lists the modalities that are captured.",
        gone_when="Captured encoders select rows.",
    ),
    Touchpoint(
        what="cos/sin caches are widened (compat.widen_rotary_caches)",
        where="vllm.model_executor.models.qwen3_vl:mrope_positions_factor",
        parameters=("vllm_config",),
        source=("speculative_config", "target_model_config", "4 if pruned"),
        why=(
            "Qwen3-VL and its kin make the cache no longer than the context unless vLLM's pruning is on; kept "
            "positions reach further."
        ),
        gone_when="vLLM lets a plugin say how many positions it needs.",
    ),
    Touchpoint(
        what="cos/sin caches are widened (compat.widen_rotary_caches)",
        where="vllm.model_executor.models.qwen3_vl_moe",
        attributes=("mrope_positions_factor",),
        why="It imports the function by name, so the name there is replaced too.",
        gone_when="vLLM lets a plugin say how many positions it needs.",
    ),
    Touchpoint(
        what="cos/sin caches are widened (compat.widen_rotary_caches)",
        where="vllm.model_executor.models.qwen3_5",
        attributes=("mrope_positions_factor",),
        why="It imports the function by name, so the name there is replaced too.",
        gone_when="vLLM lets a plugin say how many positions it needs.",
    ),
    Touchpoint(
        what="cos/sin caches have a length (families.rotary)",
        where="vllm.model_executor.layers.rotary_embedding:get_rope",
        source=("mrope_positions_factor: int = 4", '"linear"', '"yarn"', '"longrope"', "original_max_position"),
        why=(
            "Position IDs must not leave the cache; how long it is for M-RoPE and for each scaling is written in this "
            "function."
        ),
        gone_when="vLLM says how many position IDs a model has.",
    ),
    # --- requests ---
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
    # --- processors ---
    Touchpoint(
        what="processors are replaced (model.model_class, processor.ProcessorFactory)",
        where="vllm.multimodal.registry:_ProcessorFactories",
        attributes=("info", "processor", "dummy_inputs"),
        source=("self.processor(info, dummy_inputs_builder)",),
        why="Our factory builds the stock processor with EVS off and ours with EVS on.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="processors are replaced (model.model_class)",
        where="vllm.multimodal.registry:MultiModalRegistry.create_processor",
        accepts=("model_config",),
        source=("._processor_factory", "build_processor("),
        why="Processors are built from the class attribute ``_processor_factory``.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="settings of a request are read (processor.EVSProcessorMixin.apply)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor.apply",
        parameters=("self", "inputs", "timing_ctx"),
        why="The ``evs_*`` keys are taken out before Hugging Face's processor sees them.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="settings of a request are read (processor.EVSProcessorMixin.apply)",
        where="vllm.multimodal.processing.inputs:ProcessorInputs",
        attributes=("prompt", "mm_data_items", "hf_processor_mm_kwargs"),
        why="It holds a request's keys and media; inspect makes one.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="memory is profiled unpruned (processor.EVSProcessorMixin.get_dummy_mm_inputs)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor.get_dummy_mm_inputs",
        source=("self.apply(",),
        why="What the tower computes does not shrink, and dummy clips are all ties.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="cache keys are told apart (processor.EVSProcessorMixin._get_mm_hashes)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor._get_mm_hashes",
        parameters=("self", "inputs"),
        why="What a clip becomes depends on the settings, and vLLM's caches know it by this.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="clips are planned (processor.EVSProcessorMixin._get_mm_prompt_updates)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor._get_mm_prompt_updates",
        parameters=("self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
        why="Here a clip's processed fields and its placeholders are at hand, before either is cached.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="clips are counted (processor.EVSProcessorMixin._maybe_apply_prompt_updates)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor._maybe_apply_prompt_updates",
        parameters=("self", "mm_items", "mm_res"),
        source=("mm_res.prompt_ids", "mm_res.prompt_updates"),
        why="Here the whole prompt is known, with clips from the cache too, so its positions can be checked.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="clips are counted (processor.EVSProcessorMixin._maybe_apply_prompt_updates)",
        where="vllm.multimodal.processing.processor:MultiModalProcessingResult",
        attributes=("prompt_updates",),
        why="The updates of all clips are in it.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="placeholders are shortened (processor.PrunedUpdateDetails)",
        where="vllm.multimodal.processing.processor:PromptUpdateDetails",
        attributes=("full", "is_embed"),
        why="A subclass of it carries the plan with the placeholders through the processor cache.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="placeholders are shortened (processor.EVSProcessorMixin._prune)",
        where="vllm.multimodal.processing.processor:ResolvedPromptUpdate",
        attributes=("content",),
        why="An update is made anew with shorter content.",
        gone_when=PROCESSORS,
    ),
    Touchpoint(
        what="processors know their model (processor.EVSProcessorMixin)",
        where="vllm.multimodal.processing.context:BaseProcessingInfo",
        attributes=("ctx", "get_hf_config", "get_hf_processor", "get_tokenizer", "parse_mm_data"),
        why="Adapters need the config that the processor uses, and how it normalises pixels.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="processors know their model (processor.EVSProcessorMixin)",
        where="vllm.multimodal.processing.context:InputProcessingContext",
        attributes=("model_config",),
        why="The model config carries the settings.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="plans travel with clips (plan_field)",
        where="vllm.multimodal.inputs:MultiModalFieldElem",
        attributes=("data", "field"),
        why="The plan is one of a clip's fields, so caches, batching and processes carry it.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="plans travel with clips (plan_field)",
        where="vllm.multimodal.inputs:MultiModalBatchedField",
        attributes=("keep_on_cpu",),
        why="A batch is a list of plans, on the CPU.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="special attributes are denied (compat.guard_llvmlite_getattr)",
        where="llvmlite.binding.ffi:_lib_wrapper.__getattr__",
        parameters=("self", "name"),
        why="It answers to any name, and vLLM asks all objects of all modules for ``__dict__``: an engine dies of it.",
        gone_when="vLLM skips such objects.",
    ),
    Touchpoint(
        what="special attributes are denied (compat.guard_llvmlite_getattr)",
        where="vllm.triton_utils.dispatcher:_rebind_kernels",
        source=("sys.modules.values()", '"__dict__"'),
        why="It asks all objects of all modules, also without this package when numba is loaded before an engine.",
        gone_when="vLLM skips such objects.",
    ),
    # --- looking at a clip without an engine (inspect) ---
    Touchpoint(
        what="a processor is built (inspect)",
        where="vllm.multimodal:MULTIMODAL_REGISTRY",
        why="As a server builds it.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="a video is loaded (inspect)",
        where="vllm.multimodal.media:MediaConnector.__init__",
        accepts=("media_io_kwargs", "allowed_local_media_path"),
        why="As a server loads it, with its options.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="a video is loaded (inspect)",
        where="vllm.multimodal.media:MediaConnector.fetch_video",
        accepts=("video_url", "video_processor"),
        why="As a server loads it.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="frames have times (inspect)",
        where="vllm.multimodal.video",
        source=('"frames_indices"', '"fps"', '"do_sample_frames"'),
        why="The loader says which frames it took.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="a video is loaded (inspect)",
        where="vllm.transformers_utils.processor:get_video_processor_cls_name",
        parameters=("model_config",),
        why="The loader samples frames as this processor wants.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="a video is processed (inspect)",
        where="vllm.multimodal.processing:ProcessorInputs",
        why="As a server does.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="stages are timed (inspect)",
        where="vllm.multimodal.processing:TimingContext",
        attributes=("stage_secs",),
        why="The processor times its own stages.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="stages are timed (inspect)",
        where="vllm.multimodal.processing.processor:BaseMultiModalProcessor",
        source=('timing_ctx.record("apply_hf_processor")',),
        why="The time of Hugging Face's processor stands under this name.",
        gone_when="vLLM documents the names of stages.",
    ),
    Touchpoint(
        what="a prompt is made up (inspect)",
        where="vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder.get_dummy_text",
        parameters=("self", "mm_counts"),
        why="The processor needs a prompt with one video.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="a clip's fields are read (inspect)",
        where="vllm.multimodal.inputs:MultiModalKwargsItems",
        attributes=("require_data",),
        why="They come out of the processor in it.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="threads as in a server (inspect)",
        where="vllm.utils.torch_utils:set_default_torch_num_threads",
        parameters=("num_threads",),
        why="Otherwise times are not those of a server.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="the platform is named (inspect.platform_name)",
        where="vllm.platforms",
        attributes=("current_platform",),
        why="``evs-vllm doctor`` says what vLLM takes the machine for.",
        gone_when=PUBLIC,
    ),
    # --- vision attention and towers (encoder reuse) ---
    Touchpoint(
        what="attention follows schedules (attention.wrap_attention)",
        where="vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention",
        attributes=("num_heads", "head_size", "scale", "is_flash_attn_backend", "_fa_version"),
        why="Its ``forward`` is replaced on each module, and its sizes are read.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="attention follows schedules (attention.wrap_attention)",
        where="vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention.forward_native",
        parameters=("self", "query", "key", "value", "cu_seqlens", "max_seqlen", "sequence_lengths"),
        why="Towers pass these, by name or in this order.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="different query and key lengths (attention.flash_attention)",
        where="vllm.v1.attention.backends.fa_utils:flash_attn_varlen_func",
        accepts=(
            "q",
            "k",
            "v",
            "cu_seqlens_q",
            "cu_seqlens_k",
            "max_seqlen_q",
            "max_seqlen_k",
            "softmax_scale",
            "causal",
            "fa_version",
        ),
        why="The kernel of the stock attention on NVIDIA, called on gathered keys.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VisionTransformer",
        attributes=("blocks", "spatial_merge_size", "device", "dtype"),
        why="Its sizes say which rows make a token, and it makes the phases (and places) of a unit.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VisionTransformer.forward",
        parameters=("self", "x", "grid_thw", "encoder_metadata"),
        source=(
            'encoder_metadata["rotary_pos_emb_cos"]',
            'encoder_metadata["rotary_pos_emb_sin"]',
            'encoder_metadata["cu_seqlens"]',
            'encoder_metadata["max_seqlen"]',
        ),
        why="It takes all that depends on the rows from ``encoder_metadata``.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2-VL's tower has phases for a unit",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VisionTransformer.rot_pos_emb",
        parameters=("self", "grid_thw"),
        source=("return cos_combined, sin_combined\n",),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2-VL's attention is found",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VisionBlock",
        attributes=("attn",),
        why="Each block's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2-VL's attention is found",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VisionAttention",
        attributes=("attn",),
        source=("MMEncoderAttention(",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2.5-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer",
        attributes=(
            "blocks",
            "spatial_merge_size",
            "device",
            "dtype",
            "window_size",
            "patch_size",
            "fullatt_block_indexes",
        ),
        why="Its sizes say which rows make a token, and it makes the phases (and places) of a unit.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2.5-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer.forward",
        parameters=("self", "x", "grid_thw", "encoder_metadata"),
        source=(
            'encoder_metadata["rotary_pos_emb_cos"]',
            'encoder_metadata["rotary_pos_emb_sin"]',
            'encoder_metadata["cu_seqlens"]',
            'encoder_metadata["cu_window_seqlens"]',
            'encoder_metadata["window_index"]',
            'encoder_metadata["reverse_indices"]',
            'encoder_metadata["max_seqlen_full"]',
            'encoder_metadata["max_seqlen_window"]',
        ),
        why="It takes all that depends on the rows from ``encoder_metadata``.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2.5-VL's tower has phases for a unit",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer.rotary_pos_emb_thw",
        parameters=("self", "t", "h", "w"),
        source=("return cos_combined, sin_combined",),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2.5-VL's attention is found",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionBlock",
        attributes=("attn",),
        why="Each block's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen2.5-VL's attention is found",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionAttention",
        attributes=("attn",),
        source=("MMEncoderAttention(",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen3_vl:Qwen3_VisionTransformer",
        attributes=("blocks", "spatial_merge_size", "device", "dtype"),
        why="Its sizes say which rows make a token, and it makes the phases (and places) of a unit.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-VL's tower runs on computed rows",
        where="vllm.model_executor.models.qwen3_vl:Qwen3_VisionTransformer.forward",
        parameters=("self", "x", "grid_thw", "encoder_metadata"),
        source=(
            'encoder_metadata["rotary_pos_emb_cos"]',
            'encoder_metadata["rotary_pos_emb_sin"]',
            'encoder_metadata["cu_seqlens"]',
            'encoder_metadata["pos_embeds"]',
            'encoder_metadata["max_seqlen"]',
        ),
        why="It takes all that depends on the rows from ``encoder_metadata``.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-VL's tower has phases for a unit",
        where="vllm.model_executor.models.qwen3_vl:Qwen3_VisionTransformer.rot_pos_emb",
        parameters=("self", "grid_thw"),
        source=("return cos_combined, sin_combined",),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-VL's attention is found",
        where="vllm.model_executor.models.qwen3_vl:Qwen3_VisionBlock",
        attributes=("attn",),
        source=("Qwen2_5_VisionAttention(",),
        why="Each block's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-VL's tower has learned places for a unit",
        where="vllm.model_executor.models.qwen3_vl:Qwen3_VisionTransformer.fast_pos_embed_interpolate",
        parameters=("self", "grid_thw"),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's tower runs on computed rows",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionTransformer",
        attributes=("blocks", "spatial_merge_size", "device", "dtype"),
        why="Its sizes say which rows make a token, and it makes the phases (and places) of a unit.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's tower runs on computed rows",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionTransformer.forward",
        parameters=("self", "x", "grid_thw", "encoder_metadata"),
        source=(
            'encoder_metadata["rotary_pos_emb_cos"]',
            'encoder_metadata["rotary_pos_emb_sin"]',
            'encoder_metadata["cu_seqlens"]',
            'encoder_metadata["pos_embeds"]',
            'encoder_metadata["max_seqlen"]',
        ),
        why="It takes all that depends on the rows from ``encoder_metadata``.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's tower has phases for a unit",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionTransformer.rot_pos_emb",
        parameters=("self", "grid_thw"),
        source=("return cos_combined, sin_combined, pos_ids",),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's attention is found",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionBlock",
        attributes=("attn",),
        why="Each block's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's attention is found",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionAttention",
        attributes=("attn",),
        source=("MMEncoderAttention(",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="GLM-V's tower has learned places for a unit",
        where="vllm.model_executor.models.glm4_1v:Glm4vVisionTransformer.pos_embeds_interpolate",
        parameters=("self", "grid_thw"),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's tower runs on computed rows",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3Omni_VisionTransformer",
        attributes=(
            "blocks",
            "spatial_merge_size",
            "device",
            "dtype",
            "patch_embed",
            "apply_vit_abs_pos_embed",
            "deepstack_visual_indexes",
            "merger",
            "merger_list",
        ),
        why="Its sizes say which rows make a token, and it makes the phases (and places) of a unit.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's tower has phases for a unit",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3Omni_VisionTransformer.rot_pos_emb",
        parameters=("self", "grid_thw"),
        source=("return cos_combined, sin_combined",),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's attention is found",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3_VisionBlock",
        attributes=("attn",),
        source=("Qwen2_5_VisionAttention(",),
        why="Each block's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's tower has learned places for a unit",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3Omni_VisionTransformer.fast_pos_embed_interpolate",
        parameters=("self", "grid_thw"),
        why="One row for each patch, in the order of the pixel rows.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's forward is ours (omni.Qwen3OmniTower)",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3Omni_VisionTransformer.forward",
        parameters=("self", "x", "grid_thw"),
        source=(
            "self.patch_embed(hidden_states)",
            "self.apply_vit_abs_pos_embed",
            "hidden_states.unsqueeze(1)",
            "self.merger(hidden_states)",
            "self.merger_list[idx](x)",
        ),
        why="Its parts run in our function in the order that they have here.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="Qwen3-Omni's blocks are called (omni.Qwen3OmniTower)",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3_VisionBlock.forward",
        parameters=(
            "self",
            "x",
            "cu_seqlens",
            "rotary_pos_emb_cos",
            "rotary_pos_emb_sin",
            "max_seqlen",
            "sequence_lengths",
        ),
        why="Our forward passes these.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VLForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen3_5:Qwen3_5ForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen3_5:Qwen3_5MoeForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.glm4_1v:Glm4vForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="the tower is found (families)",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration",
        attributes=("visual",),
        why="Adapters take it from the model by this name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1:InternS1ForConditionalGeneration",
        attributes=("vision_tower", "multi_modal_projector", "downsample_ratio", "pixel_shuffle"),
        why="The layers run in `PlainTower`, on computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1:InternS1ForConditionalGeneration.pixel_shuffle",
        parameters=("self", "x", "scale_factor"),
        why="It makes one token of a square of patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternS1VisionModel",
        attributes=("embeddings", "encoder", "layernorm"),
        why="The norm after the layers is ours to apply.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternS1VisionEmbeddings",
        attributes=("cls_token", "position_embeddings", "patch_embeddings"),
        why="Class token and learned positions are added to computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternS1VisionPatchEmbeddings",
        attributes=("projection",),
        why="The convolution embeds packed blocks.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternS1VisionEncoder",
        attributes=("layer",),
        why="The layers run one after the other.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternS1VisionLayer",
        attributes=("attention",),
        why="Each layer's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL-HF's parts are found (internvl.InternVLNative)",
        where="vllm.model_executor.models.interns1_vit:InternSdpaAttention",
        attributes=("attn",),
        source=("MMEncoderAttention(",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.internvl:InternVLChatModel",
        attributes=("vision_model", "mlp1", "downsample_ratio", "pixel_shuffle"),
        why="The layers run in `PlainTower`, on computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.internvl:InternVLChatModel.pixel_shuffle",
        parameters=("self", "x", "scale_factor"),
        why="It makes one token of a square of patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.intern_vit:InternVisionModel",
        attributes=("embeddings", "encoder"),
        why="Embeddings and layers run one after the other.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.intern_vit:InternVisionEmbeddings",
        attributes=("class_embedding", "position_embedding", "patch_embedding"),
        why="Class token and learned positions are added to computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.intern_vit:InternVisionEncoder",
        attributes=("layers",),
        why="The layers run one after the other.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.intern_vit:InternVisionEncoderLayer",
        attributes=("attn",),
        why="Each layer's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="InternVL's parts are found (internvl.InternVLChat)",
        where="vllm.model_executor.models.intern_vit:InternParallelAttention",
        attributes=("attn",),
        source=("MMEncoderAttention(",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.llava_next_video:LlavaNextVideoForConditionalGeneration",
        attributes=("config", "vision_tower", "vision_resampler", "multi_modal_projector"),
        why="The layers run in `PlainTower`, on computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.llava_next_video:LlavaNextVideoPooler",
        attributes=("pool",),
        why="It makes one token of a square of patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPVisionModel",
        attributes=("vision_model",),
        why="The tower is inside it.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPVisionTransformer",
        attributes=("embeddings", "encoder", "pre_layrnorm"),
        why="The norm before the layers has this (misspelt) name.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPVisionEmbeddings",
        attributes=("class_embedding", "position_embedding", "patch_embedding"),
        why="Class token and learned positions are added to computed patches.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPEncoder",
        attributes=("layers",),
        why="The layers run one after the other.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPEncoderLayer",
        attributes=("self_attn",),
        why="Each layer's attention holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's parts are found (llava.LlavaNextVideo)",
        where="vllm.model_executor.models.clip:CLIPAttention",
        attributes=("attn",),
        why="It holds the module that is wrapped.",
        gone_when=TOWERS,
    ),
    # --- fields of a clip and positions of a model (families) ---
    Touchpoint(
        what="Qwen2-VL's fields are read",
        where="vllm.model_executor.models.qwen2_vl:_create_qwen2vl_field_factory",
        source=("pixel_values_videos=", "video_grid_thw="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Qwen2.5-VL's fields are read",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLMultiModalProcessor",
        source=("second_per_grid_ts=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="InternVL-HF's fields are read",
        where="vllm.model_executor.models.interns1:InternS1MultiModalProcessor",
        source=("pixel_values_videos=", "video_num_patches="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="InternVL's fields are read",
        where="vllm.model_executor.models.internvl:InternVLMultiModalProcessor",
        source=("pixel_values_flat_video=", "video_num_patches="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's fields are read",
        where="vllm.model_executor.models.llava_next_video:LlavaNextVideoMultiModalProcessor",
        source=("pixel_values_videos=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="LLaVA-OneVision's fields are read",
        where="vllm.model_executor.models.llava_onevision:LlavaOnevisionMultiModalProcessor",
        source=("pixel_values_videos=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Gemma 4's fields are read",
        where="vllm.model_executor.models.gemma4_mm:Gemma4MultiModalProcessor",
        source=("pixel_values_videos", "pixel_position_ids_videos", "video_frame_counts"),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Ovis2.5's fields are read",
        where="vllm.model_executor.models.ovis2_5:Ovis2_5MultiModalProcessor",
        source=("video_pixel_values=", "video_grids="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Qwen2-VL's positions are counted (families)",
        where="vllm.model_executor.models.qwen2_vl:Qwen2VLForConditionalGeneration",
        source=('"tokens_per_second", 1.0', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen2.5-VL's positions are counted (families)",
        where="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        source=('"tokens_per_second", 1.0', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen3-VL's positions are counted (families)",
        where="vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration._iter_mm_grid_hw",
        source=("for _ in range(t)", "vision_start_token_id"),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen2.5-Omni's positions are counted (families)",
        where="vllm.model_executor.models.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
        source=('"tokens_per_second", 25', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen3-Omni's positions are counted (families)",
        where="vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration",
        source=("position_id_per_seconds", "second_per_grid"),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
)
