# SPDX-License-Identifier: Apache-2.0
"""What engine sessions with video build on: requests that take in one prompt after the other."""

from evs_vllm.engine.touchpoints.row import PROCESSORS, Touchpoint

BOUNDED = "vLLM refuses an input with which a session is too long, and a model can bound the positions of a request."

ROWS: tuple[Touchpoint, ...] = (
    Touchpoint(
        what="inputs of a session are judged with what came before (compat.wrap_session_input)",
        where="vllm.v1.engine.async_llm:AsyncLLM._add_request",
        parameters=("self", "request", "prompt", "parent_req", "index", "queue"),
        why="vLLM judges each by itself, and stops serving where their sum exceeds the context.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="a refusal ends its session (compat.wrap_session_input)",
        where="vllm.v1.engine.async_llm:AsyncLLM._add_streaming_input_request",
        source=("await self._add_request(req, prompt_text, None, 0, queue)", "InputStreamError(error)"),
        why="What is raised there is raised to who iterates the answers.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="inputs of a session are judged with what came before (sessions.admit_input)",
        where="vllm.v1.engine.async_llm:AsyncLLM",
        attributes=("model_config", "output_processor", "renderer"),
        why="How long the context is, what has been generated, and where the processor cache is.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="clips of a refused input are not taken for sent (limits.take_back)",
        where="vllm.renderers.base:BaseRenderer",
        attributes=("mm_processor_cache",),
        why="The next session sends them again.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="clips of a refused request are not taken for sent (limits.take_back)",
        where="vllm.multimodal.cache.base:BaseMultiModalProcessorCache.invalidate",
        parameters=("self", "mm_hash"),
        why="Else the next request with them fails: the engine core never had them.",
        gone_when="vLLM forgets what a request that fails put into this cache.",
    ),
    Touchpoint(
        what="inputs of a session are judged with what came before (sessions.admit_input)",
        where="vllm.v1.engine:EngineCoreRequest",
        attributes=("request_id", "resumable", "prompt_token_ids", "mm_features", "sampling_params"),
        why="It is what an input was made into.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="answers of a session are counted (sessions.admit_input)",
        where="vllm.v1.engine.output_processor:OutputProcessor",
        attributes=("request_states",),
        why="They are part of the session's length.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="answers of a session are counted (sessions.admit_input)",
        where="vllm.v1.engine.output_processor:RequestState",
        attributes=("input_chunk_queue", "detokenizer"),
        why="The queue is None while nothing is being generated.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="answers of a session are counted (sessions.admit_input)",
        where="vllm.v1.engine.detokenizer:IncrementalDetokenizer",
        attributes=("num_output_tokens",),
        why="It goes on over the inputs of a session.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="a session's sums go with it (sessions.admit_input)",
        where="vllm.v1.engine.output_processor:RequestOutputCollector",
        attributes=("output",),
        why="There is one for each session, and what is noted on it is gone when the session is.",
        gone_when=BOUNDED,
    ),
    Touchpoint(
        what="answers of a session end in time (compat.wrap_add_request)",
        where="vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session",
        parameters=("self", "session", "update"),
        source=(
            "session.num_prompt_tokens = len(session.prompt_token_ids)",
            "session.max_tokens = update.max_tokens",
            "session.num_prompt_tokens : num_computed_tokens",
        ),
        why="After it the request holds the whole session: its length, its clips, and the bound of the next answer.",
        gone_when="A model can bound the positions of a request.",
    ),
    Touchpoint(
        what="positions of a session (model.EVSModelMixin.get_mrope_input_positions)",
        where="vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_streaming_request",
        source=("self._init_mrope_positions(req_state)", "req_state.mm_features = new_req_data.mm_features"),
        why="Of each input the positions are those of all that the session holds, made anew from its plans.",
        gone_when="vLLM lets a plugin number a prompt.",
    ),
    Touchpoint(
        what="ranges say how many positions they take up (plan_field.PrunedRange)",
        where="vllm.multimodal.processing.processor:PlaceholderFeaturesInfo",
        attributes=("modality", "item_idx", "start_idx", "tokens", "is_embed", "to_range"),
        why="An API server has no plan of a clip that the engine core has cached.",
        gone_when=PROCESSORS,
    ),
)
