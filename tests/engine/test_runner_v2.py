# SPDX-License-Identifier: Apache-2.0
"""vLLM's second model runner (V2, the default on GPUs), as far as a CPU runs it.

V2 takes a request's position IDs when it is added, prompt and generated tokens alike, and gathers its embeddings step
by step. These are its own classes, fed with what the engine core was sent: `EncoderCache`, `RequestState`, and
`DefaultModelState` with its `RopeState` and `EncoderRunner`. Its two Triton kernels that move position IDs run in
Triton's interpreter. What needs a GPU is not here: the forward pass, sampling, its CUDA graphs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evs_vllm.engine.plan_field import plan_of
from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import IMAGE, TOLERANCE, VIDEO, Request, chat, expected, sized
from tests.e2e.sessions import CLOSE, Session, answer, answered
from tests.reference.frames import FramesReference
from tests.reference.hf import Clip, Picture, Settings

# A clip in one piece, one in pieces between text (with deepstack), and 1-D RoPE.
pytestmark = [pytest.mark.vllm, pytest.mark.families(["qwen2_5_vl", "qwen3_vl", "llava_next_video"])]

EVS = {"rate": 0.75, "request_overrides": "any"}


@pytest.fixture(scope="module")
def ref(reference, family):
    return reference(family)


@pytest.fixture
def engine(engines, family):
    return engines.get(family, EVS)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """V2's kernels in Triton's interpreter; without a GPU, vLLM leaves them as they are written."""
    language = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.mm import rope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_utils, "is_uva_available", lambda: False)
        for module, name in ((buffer_utils, "_apply_write_kernel"), (rope, "_prepare_rope_positions_kernel")):
            kernel = getattr(module, name)
            patch.setattr(module, "tl", language)
            # The only annotations are those of constants.
            patch.setattr(kernel, "__annotations__", dict.fromkeys(kernel.__annotations__, language.constexpr))
            patch.setattr(module, name, InterpretedFunction(kernel))
        yield


class RunnerV2:
    """What V2's GPUModelRunner does with requests, in its order, around its own classes."""

    def __init__(self, engine):
        from vllm.v1.worker.gpu.input_batch import InputBuffers
        from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
        from vllm.v1.worker.gpu.states import RequestState

        self.config = engine.llm.llm_engine.vllm_config
        device, length = torch.device("cpu"), self.config.model_config.max_model_len
        self.cache = EncoderCache()
        self.state = DefaultModelState(self.config, engine.runner.model, self.cache, device)
        self.requests = RequestState(8, length, 4096, 0, self.config.model_config.get_vocab_size(), device)
        self.buffers = InputBuffers(8, 4096, device)

    def add(self, sent, generated=(), computed=0):
        """A new or resumed request, as the engine core was sent it."""
        from vllm.v1.request import Request as Scheduled

        request = Scheduled.from_engine_core_request(sent, None)
        request.append_output_token_ids(list(generated))
        return self.add_scheduled(request, computed)

    def add_scheduled(self, request, computed):
        """As `GPUModelRunner.add_requests`, with what the scheduler makes of its request."""
        from vllm.v1.core.sched.output import NewRequestData

        request.num_computed_tokens = computed
        uses_mrope = self.config.model_config.uses_mrope
        new = NewRequestData.from_request(request, ([],), request._all_token_ids, uses_mrope=uses_mrope)
        if new.req_id in self.requests.req_id_to_index:
            self.cache.remove_request(new.req_id)
            self.requests.remove_request(new.req_id)
            self.state.remove_request(new.req_id)
        self.requests.add_request(new.req_id, new.prompt_len, new.prefill_token_ids, computed, 64)
        index = self.requests.req_id_to_index[new.req_id]
        self.cache.add_request(new.req_id, new.mm_features)
        self.state.add_request(index, new)
        self.requests.apply_staged_writes()
        self.state.apply_staged_writes()
        return new.req_id

    def positions_of(self, name):
        """The position IDs of all tokens that the request was added with."""
        index = self.requests.req_id_to_index[name]
        return self.state.rope_state.read_prefill_positions(index, int(self.requests.prefill_len.np[index])).numpy()

    def step(self, scheduled):
        """One step of {request: (computed tokens, tokens to compute)}: {request: (positions, embeddings, is clip)}."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        index = np.array([self.requests.req_id_to_index[name] for name in scheduled])
        computed, counts = (np.array(x, dtype=np.int32) for x in zip(*scheduled.values()))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.requests.num_computed_tokens.gpu[torch.from_numpy(index)] = torch.from_numpy(computed)
        rows = [self.requests.all_token_ids.gpu[i, c : c + n] for i, c, n in zip(index, computed, counts)]
        lengths = self.requests.prefill_len.np[index]
        batch = replace(
            InputBatch.make_dummy(len(index), int(starts[-1]), self.buffers),
            req_ids=list(scheduled),
            idx_mapping=torch.from_numpy(index),
            idx_mapping_np=index,
            num_scheduled_tokens=counts,
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_np=starts,
            num_computed_tokens_np=computed,
            num_computed_prefill_tokens_np=np.minimum(computed, lengths),
            prefill_len_np=lengths,
            input_ids=torch.cat(rows),
        )
        encode = {}
        for name, (first, count) in scheduled.items():
            spans = [feature.mm_position for feature in self.cache.mm_features[name]]
            encode[name] = [
                i for i, span in enumerate(spans) if span.offset < first + count and first < span.offset + span.length
            ]
        embeds = self.state.prepare_inputs_embeds(encode, batch, self.requests)
        gathered, is_clip = self.state.gather_mm_embeddings(batch)
        assert sum(map(len, gathered)) == is_clip.sum()
        positions = self.state.prepare_inputs(batch, self.requests)["positions"]
        return {
            name: (positions[:, a:b].numpy().copy(), embeds[a:b].clone(), is_clip[a:b].numpy().copy())
            for name, a, b in zip(scheduled, starts, starts[1:])
        }


@pytest.fixture
def runner(engine):
    return RunnerV2(engine)


def requests_of(ref, family, facts):
    """Position modes and rates side by side, one prompt with an image where vLLM has them."""
    kinds = [
        Settings(0.75),
        Settings(0.5, positions="sequential"),
        Settings(0.9),
    ]
    out = []
    for i, settings in enumerate(kinds):
        size = facts.frame_size if facts.whole_frames else sized(family, (84, 112))
        media = [Clip(synthetic_clip(10 + i, size, noise=2, seed=200 + i), settings=settings)]
        video = "<video>\n" if facts.whole_frames else VIDEO
        prompt = [video, f"Question {i}?"]
        if i == 2 and facts.images:
            media.insert(0, Picture(synthetic_clip(1, (84, 112), "noise", seed=210)[0]))
            prompt.insert(0, IMAGE)
        kwargs = {"evs_rate": settings.rate, "evs_positions": settings.positions}
        out.append(Request(chat(*prompt), media, kwargs, max_tokens=4))
    return out


def sent_by(engine, ref, requests):
    """What the engine core was sent for the requests, and the reference's answers. V1 runs them meanwhile."""
    engine.generate(requests)
    assert len(engine.sent) == len(requests)
    return list(zip(engine.sent, [expected(ref, request) for request in requests], strict=True))


@torch.inference_mode()
def rows_of(ref, request, result):
    """(tokens, hidden) what the language model gets: the text's embeddings and the kept rows of the full tower."""
    rows = ref.model.get_input_embeddings()(torch.tensor(result.prompt_ids)).clone()
    kept = iter(result.kept)
    for kind, token in ((Picture, ref.image_id), (Clip, ref.video_id)):
        seen = []
        for item in (m for m in request.media if isinstance(m, kind)):
            if kind is Picture:
                seen.append(ref._see_image(item)[0])
            else:
                see = ref.see_clip if isinstance(ref, FramesReference) else ref._see_clip
                seen.append(see(item)[0][torch.from_numpy(next(kept))])
        if seen:
            rows[torch.tensor(result.prompt_ids) == token] = torch.cat(seen)[:, : rows.shape[1]]
    return rows


def prefill(runner, names, lengths, share):
    """All tokens of each request, in steps of `share` tokens and more of each: (positions, embeddings, is clip)."""
    parts = {name: [] for name in names}
    done = dict.fromkeys(names, 0)
    while any(done[name] < lengths[name] for name in names):
        counts = {n: min(lengths[n] - done[n], share + 3 * i) for i, n in enumerate(names)}
        out = runner.step({n: (done[n], count) for n, count in counts.items() if count})
        for name, part in out.items():
            parts[name].append(part)
            done[name] += counts[name]
    joined = {}
    for name, pieces in parts.items():
        positions, embeds, is_clip = zip(*pieces)
        joined[name] = np.concatenate(positions, axis=1), torch.cat(embeds), np.concatenate(is_clip)
    return joined


def test_positions_and_embeddings_of_prefill_in_pieces(engine, runner, ref, family, facts):
    assert runner.state.mm_pruner is None, "V2 would read position IDs out of the embeddings"
    requests = requests_of(ref, family, facts)
    cases = sent_by(engine, ref, requests)
    names = [runner.add(sent) for sent, _ in cases]
    lengths = {name: len(result.prompt_ids) for name, (_, result) in zip(names, cases)}
    for share in (17, 400):
        got = prefill(runner, names, lengths, share)
        for name, request, (sent, result) in zip(names, requests, cases, strict=True):
            positions, embeds, is_clip = got[name]
            np.testing.assert_array_equal(positions, np.broadcast_to(result.positions, positions.shape))
            rows = rows_of(ref, request, result)
            assert float((embeds - rows).abs().max()) <= TOLERANCE * float(rows.abs().max())
            assert is_clip.sum() == sum(feature.mm_position.get_num_embeds() for feature in sent.mm_features)
    # One entry for each item, with as many rows as the scheduler counts against its budget.
    features = [feature for sent, _ in cases for feature in sent.mm_features]
    assert {f.identifier: len(runner.cache.encoder_outputs[f.identifier]) for f in features} == {
        f.identifier: f.mm_position.get_num_embeds() for f in features
    }
    clips = [f for f in features if f.modality == "video"]
    assert [plan_of(f.data).num_kept for f in clips] == [len(kept) for _, result in cases for kept in result.kept]


def test_decoding_and_resumption(engine, runner, ref, family, facts):
    """A request that was preempted comes back with its generated tokens as part of what is prefilled."""
    for sent, result in sent_by(engine, ref, requests_of(ref, family, facts)):
        name, count = runner.add(sent), len(result.prompt_ids)
        prefill(runner, [name], {name: count}, 400)
        following = result.following + np.arange(8)
        for step in range(3):
            ((positions, _, is_clip),) = runner.step({name: (count + step, 1)}).values()
            assert positions[:, 0].tolist() == [following[step]] * 3 and not is_clip.any()
        runner.add(sent, generated=result.tokens)
        whole = np.concatenate([np.broadcast_to(result.positions, (3, count)), np.tile(following[:4], (3, 1))], axis=1)
        np.testing.assert_array_equal(runner.positions_of(name), whole)
        positions, _, is_clip = prefill(runner, [name], {name: count + 4}, 23)[name]
        np.testing.assert_array_equal(positions, whole)
        assert is_clip.sum() == sum(feature.mm_position.get_num_embeds() for feature in sent.mm_features)
        ((positions, _, _),) = runner.step({name: (count + 4, 1)}).values()
        assert positions[:, 0].tolist() == [following[4]] * 3


def test_an_input_of_a_session(engine, runner, ref, family, facts):
    """The request comes again with all that it took in and answered; what it had computed stays computed."""
    if facts.whole_frames:
        pytest.skip("the reference of these families takes no answers amid a prompt")
    size = sized(family, (84, 112))
    for seed in range(220, 260):
        settings = Settings(0.75)
        clips = [Clip(synthetic_clip(10, size, noise=2, seed=seed + i), settings=settings) for i in range(2)]
        said = [(chat(VIDEO, "What?"), clips[:1]), (CLOSE + chat(VIDEO, "And now?"), clips[1:])]
        if turns := answered(ref, said, 4):
            break
    session = Session(engine, "a session", chained=False)
    for turn in turns:
        session.add(turn)
        answer(engine, [session])
        session.check(turn)
    scheduled = engine.llm.llm_engine.engine_core.engine_core.scheduler.requests["a session"]
    first, second = (turn.answer for turn in turns)
    del scheduled._all_token_ids[scheduled.num_prompt_tokens :]  # the answer to the second input
    computed = len(first.prompt_ids) + 3
    name = runner.add_scheduled(scheduled, computed)
    whole = np.broadcast_to(second.positions, (3, len(second.prompt_ids)))
    np.testing.assert_array_equal(runner.positions_of(name), whole)
    ((positions, embeds, _),) = runner.step({name: (computed, len(second.prompt_ids) - computed)}).values()
    np.testing.assert_array_equal(positions, whole[:, computed:])
    rows = rows_of(ref, Request("", clips), second)[computed:]
    assert float((embeds - rows).abs().max()) <= TOLERANCE * float(rows.abs().max())
    ((positions, _, _),) = runner.step({name: (len(second.prompt_ids), 1)}).values()
    assert positions[:, 0].tolist() == [second.following] * 3
    engine.llm.llm_engine.abort_request(["a session"])


def test_cached_prefix(engine, runner, ref, family, facts):
    """Of an item that a cached prefix covers, the scheduler sends no pixels: the plan still reaches V2."""
    for sent, result in sent_by(engine, ref, requests_of(ref, family, facts)):
        covered = max(f.mm_position.offset + f.mm_position.length for f in sent.mm_features)
        name = runner.add(sent, computed=covered)
        sent_fields = [set(feature.data) for feature in sent.mm_features]
        left = [set(feature.data) for feature in runner.cache.mm_features[name]]
        assert all(here < there for here, there in zip(left, sent_fields, strict=True)), "nothing was left out"
        np.testing.assert_array_equal(
            runner.positions_of(name), np.broadcast_to(result.positions, (3, len(result.prompt_ids)))
        )
        ((positions, _, is_clip),) = runner.step({name: (covered, len(result.prompt_ids) - covered)}).values()
        np.testing.assert_array_equal(positions, np.broadcast_to(result.positions[:, covered:], positions.shape))
        assert not is_clip.any() and not runner.cache.encoder_outputs


def test_memory_is_profiled_unpruned(runner):
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(runner.config, MULTIMODAL_REGISTRY, enable_cache=False)
    ((_, item), *_) = inputs = budget.get_dummy_encoder_profile_inputs("video")
    assert plan_of(item) is None
    runner.state.encoder_runner.profile_encoder_cache(inputs, budget)
    pixels = item["pixel_values_videos"].data
    rows = len(pixels) // 4 if pixels.ndim == 2 else len(pixels) * 16  # patches, or frames
    assert [len(embeds) for embeds in runner.cache.encoder_outputs.values()] == [rows] * len(inputs)
