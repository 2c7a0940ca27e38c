# SPDX-License-Identifier: Apache-2.0
"""What our model classes build on."""

from evs_vllm.engine.touchpoints.row import MODELS, PUBLIC, Touchpoint

ROWS: tuple[Touchpoint, ...] = (
    Touchpoint(
        what="model classes are replaced (compat.replace_model_class)",
        where=MODELS + "registry:_ModelRegistry.register_model",
        parameters=("self", "model_arch", "model_cls"),
        why='The way for a plugin to serve an architecture with a class of its own, given as "module:Class".',
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="stock classes are found (compat.stock_model_class)",
        where=MODELS + "registry:_ModelRegistry",
        attributes=("models",),
        why="Our class has vLLM's as its base, and EVS off means vLLM's.",
        gone_when="vLLM says what an architecture was registered to.",
    ),
    Touchpoint(
        what="stock classes are found (compat.stock_model_class)",
        where=MODELS + "registry:_LazyRegisteredModel",
        attributes=("module_name", "class_name"),
        source=("self.class_name", "getattr(mod, self.class_name)"),
        why="Entries name the module and the class.",
        gone_when="vLLM says what an architecture was registered to.",
    ),
    Touchpoint(
        what="facts of a class are cached (compat.replace_model_class)",
        where=MODELS + "registry:_LazyRegisteredModel._get_cache_filename",
        source=("self.module_name", "self.class_name"),
        why=(
            "The version is in the name of our classes: the cache knows a class by that and the hash of its module's "
            "file."
        ),
        gone_when="vLLM's own version is part of that cache's key.",
    ),
    Touchpoint(
        what="video embeddings are pruned (model.EVSModelMixin.embed_multimodal)",
        where=MODELS + "interfaces:SupportsMultiModal.embed_multimodal",
        parameters=("self", "**kwargs"),
        why="Rows of dropped tokens leave here, once for both runners.",
        gone_when="vLLM lets a plugin choose embedding rows.",
    ),
    Touchpoint(
        what="towers of other processes are known (model.tower_is_elsewhere)",
        where=MODELS + "utils:StageMissingLayer",
        attributes=("stage_name",),
        why="Where a stage of a pipeline, or a server without media, has no tower, there is nothing to wrap.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="towers of other processes are known (model.tower_is_elsewhere)",
        where=MODELS + "interfaces:SupportsMultiModal",
        attributes=("_language_model_names",),
        why="An encoder apart has a tower, and no language model.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="positions are gathered (model.EVSModelMixin.get_mrope_input_positions)",
        where=MODELS + "interfaces:SupportsMRoPE.get_mrope_input_positions",
        parameters=("self", "input_tokens", "mm_features"),
        why="Kept tokens keep the positions of the unpruned prompt.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="1-D models say that they number prompts (model.OneAxisMixin)",
        where=MODELS + "interfaces:SupportsMRoPE",
        attributes=("supports_mrope",),
        why="Runners ask only such models for positions.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="M-RoPE is asked for (model.model_class)",
        where=MODELS + "interfaces:supports_mrope",
        parameters=("model",),
        why="1-D models get another mixin.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="runner V1 asks for positions (model)",
        where="vllm.v1.worker.gpu_model_runner",
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
        where=MODELS + "interfaces:SupportsEncoderCudaGraph.get_encoder_cudagraph_config",
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
        where=MODELS + "qwen3_vl:mrope_positions_factor",
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
        where=MODELS + "qwen3_vl_moe",
        attributes=("mrope_positions_factor",),
        why="It imports the function by name, so the name there is replaced too.",
        gone_when="vLLM lets a plugin say how many positions it needs.",
    ),
    Touchpoint(
        what="cos/sin caches are widened (compat.widen_rotary_caches)",
        where=MODELS + "qwen3_5",
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
)
