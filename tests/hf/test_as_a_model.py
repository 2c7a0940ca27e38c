# SPDX-License-Identifier: Apache-2.0
"""A model with EVS enabled is still a model: gradients, caches, beams, copies, checkpoints, clear refusals."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

import evs_vllm.hf as hf
from evs_vllm.errors import ConfigError, EVSError, RequestError, UnsupportedError
from evs_vllm.testing import synthetic_clip
from tests.families.registry import families, most_engine_tests
from tests.hf.harness import ASK, TOKENS, TOLERANCE, VIDEO, chat, enable, inputs
from tests.reference.hf import Clip, Settings


@families(most_engine_tests)
def test_labels_and_gradients_follow(model, ref):
    enable(model, 0.75)
    clips = [synthetic_clip(16, seed=1), synthetic_clip(9, (56, 140), seed=2)]
    answers = [ref.generate(ASK, [Clip(c, settings=Settings(0.75))], TOKENS) for c in clips]
    expected = -np.mean([row[t] for a in answers for row, t in zip(a.logprobs, a.tokens)])
    tokens = torch.tensor([a.tokens for a in answers])
    for side in ("left", "right"):
        batch = inputs(ref, [ASK, ASK], [[c] for c in clips])
        added = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": tokens * 0}
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), tokens], dim=1)
        for name, values in added.items():
            batch[name] = torch.cat([batch[name], values], dim=1)
        if side == "right":
            padding = (batch["attention_mask"] == 0).sum(1).tolist()
            assert max(padding) > 0
            for values in (labels, *(batch[name] for name in added)):
                for row, count in enumerate(padding):
                    values[row] = values[row].roll(-count)
        model.zero_grad()
        out = model(**batch, labels=labels)
        assert abs(out.loss.item() - expected) < TOLERANCE
        out.loss.backward()
        grad = model.model.visual.patch_embed.proj.weight.grad
        assert grad is not None and grad.abs().max() > 0


def test_gradient_of_the_tower_is_that_of_the_gathered_embeddings(model, ref):
    """Only kept tokens send gradients back: against finite differences of one patch weight."""
    enable(model, 0.75)
    model.double()
    batch = inputs(ref, [ASK], [[synthetic_clip(8, (56, 84), seed=1)]])
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    labels = batch["input_ids"].clone()
    labels[labels == ref.video_id] = -100
    weight = model.model.visual.patch_embed.proj.weight
    model(**batch, labels=labels).loss.backward()
    place = (3, 1, 0, 5, 5)
    with torch.no_grad():
        before = weight[place].item()
        losses = []
        for step in (1e-3, -1e-3):
            weight[place] = before + step
            losses.append(model(**batch, labels=labels).loss.item())
    assert weight.grad[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)


@families(most_engine_tests)
@torch.inference_mode()
def test_manual_decoding_with_a_cache(model, ref):
    enable(model, 0.75)
    clip = synthetic_clip(16, seed=1)
    batch = inputs(ref, [ASK], [[clip]])
    expected = ref.generate(ASK, [Clip(clip, settings=Settings(0.75))], 3)
    out = model(**batch, use_cache=True)
    (token,) = out.logits[:, -1].argmax(-1)
    cache = out.past_key_values
    with pytest.raises(RequestError, match="cache holds"):
        too_long = torch.ones(1, batch["input_ids"].shape[1] + 1)
        model(input_ids=token.view(1, 1), attention_mask=too_long, past_key_values=cache)
    for step in range(1, 3):
        out = model(input_ids=token.view(1, 1), past_key_values=cache)
        assert np.abs(torch.log_softmax(out.logits[0, -1], -1).numpy() - expected.logprobs[step]).max() < TOLERANCE
        token = out.logits[0, -1].argmax(-1)


@families(most_engine_tests)
def test_beams_and_length_limits(model, ref):
    enable(model, 0.75)
    clips = [synthetic_clip(16, seed=1), synthetic_clip(9, (56, 140), seed=2)]
    both = inputs(ref, [ASK, ASK], [[c] for c in clips])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    together = model.generate(**both, **beams)
    assert together.shape == (4, both["input_ids"].shape[1] + 4)
    for row, clip in enumerate(clips):
        alone = model.generate(**inputs(ref, [ASK], [[clip]]), **beams)
        assert torch.equal(together[2 * row : 2 * row + 2, -4:], alone[:, -4:])
    length = both["input_ids"].shape[1]
    assert model.generate(**both, max_length=length + 3).shape[1] == length + 3
    config = copy.deepcopy(model.generation_config)
    config.max_length = length + 2
    assert model.generate(**both, generation_config=config).shape[1] == length + 2
    assert (
        model.generate(both.input_ids, None, **{**both, "input_ids": None}, max_length=length + 3).shape[1]
        == length + 3
    )
    # What the call's settings leave open is as the model's say.
    model.generation_config.max_length = length + 4
    greedy = transformers.GenerationConfig(do_sample=False)
    assert model.generate(**both, generation_config=greedy).shape[1] == length + 4
    model.generation_config.max_length = None
    assert model.generate(inputs=both.pop("input_ids"), **both, max_new_tokens=5).shape[1] == length + 5


def test_copies_and_checkpoints(model, ref, tmp_path):
    enable(model, 0.75)
    other = hf.disable(copy.deepcopy(model))
    batch = inputs(ref, [ASK], [[synthetic_clip(8, seed=1)]])
    with torch.inference_mode():
        assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1] - 60
        assert other(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [type(ref.model).__name__]
    again = type(ref.model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ref.model.state_dict().values()))


def test_another_normalisation(model, ref):
    enable(model, 0.75)
    batch = inputs(ref, [ASK], [[synthetic_clip(8, seed=1)]])
    raw = copy.deepcopy(ref.processor)
    raw.video_processor.image_mean = raw.video_processor.image_std = [0.5, 0.5, 0.5]
    stats = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[:, None, :, None]
    rows = batch["pixel_values_videos"].view(-1, 3, 392) * stats[1] + stats[0]
    changed = dict(batch) | {"pixel_values_videos": ((rows - 0.5) / 0.5).view(-1, 1176)}
    with pytest.raises(RequestError, match="processor="):
        model(**changed)
    with torch.inference_mode():
        model(**batch)
        kept = hf.last_plans(model)[0].kept.tolist()
        enable(model, 0.75, processor=raw)(**changed)
    assert hf.last_plans(model)[0].kept.tolist() == kept


def test_reuse_is_refused_where_the_tower_is_not_ours(model_dir):
    from transformers import Qwen3VLForConditionalGeneration

    model = enable(Qwen3VLForConditionalGeneration.from_pretrained(model_dir("qwen3_vl")), 0.5)
    for kwargs in ({"evs_encoder": "reuse"}, {"evs_encoder": "reuse", "evs_rate": 0}):
        with pytest.raises(UnsupportedError, match="Qwen3VL.*'full'"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long), **kwargs)


def test_refusals(model, ref):
    batch = inputs(ref, [ASK, chat(VIDEO, "Why?")], [[synthetic_clip(8, seed=1)], [synthetic_clip(6, seed=2)]])
    for wrong, error in (({"rate": 1}, ConfigError), ({"x": 1}, ConfigError), ({"selection": "best"}, ConfigError)):
        with pytest.raises(error):
            enable(model, **wrong)
    with pytest.raises(UnsupportedError, match="Linear"):
        enable(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match="enable"):
        hf.last_plans(model)
    enable(model, 0.75)
    ids = batch["input_ids"]
    odd = ids.clone()
    odd[0, (ids[0] == ref.video_id).nonzero()[3]] = 5
    both_sides = batch["attention_mask"].clone()
    both_sides[0, -1] = 0
    holes = batch["attention_mask"].clone()
    holes[:, 40] = 0
    embeds = model.get_input_embeddings()(ids)
    for change, message in (
        ({"position_ids": torch.zeros(3, *ids.shape)}, "position_ids"),
        ({"inputs_embeds": embeds}, "inputs_embeds"),
        ({"evs_rate": 2}, "evs_rate"),
        ({"evs_speed": 2}, "evs_speed"),
        ({"evs_encoder": "reuse", "evs_encoder_refresh": 0}, "no backward"),
        ({"input_ids": odd}, "placeholders"),
        ({"video_grid_thw": batch["video_grid_thw"][:1]}, "rows"),
        ({"attention_mask": both_sides}, "padded|Pad"),
        ({"attention_mask": holes}, "Pad each row"),
        ({"attention_mask": torch.ones(2, 1, 8, 8)}, "attention_mask"),
    ):
        with pytest.raises(EVSError, match=message):
            model(**(dict(batch) | change))
    with pytest.raises(RequestError, match="left"):
        right = inputs(ref, [ASK, chat(VIDEO, "?")], [[synthetic_clip(8)], [synthetic_clip(6)]], side="right")
        model.generate(**right)
    with pytest.raises(RequestError, match="text after"):
        model.generate(**inputs(ref, ["<|video_pad|>"], [[synthetic_clip(6)]]))
    with pytest.raises(UnsupportedError, match="assistant_model"):
        model.generate(**batch, assistant_model=ref.model)


@families(most_engine_tests)
@torch.inference_mode()
def test_a_batch_without_a_mask_is_padded_where_generate_takes_it_for_padded(model, ref):
    """Its clips drop other numbers of tokens, so a mask goes to the stock method, which would else infer one."""
    enable(model, 0.75)
    both = inputs(ref, [ASK, ASK], [[synthetic_clip(16, seed=1)], [synthetic_clip(8, seed=2)]])
    padding = int(both["input_ids"][1, 0])
    assert both["attention_mask"][1, 0] == 0
    told = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": padding}
    expected = model.generate(**both, **told, eos_token_id=None).logits
    mask = both.pop("attention_mask")
    alike = model.generate(**both, **told, eos_token_id=None).logits
    assert all(torch.equal(one, other) for one, other in zip(expected, alike, strict=True))
    # Where padding ends texts, too, it may be text.
    ends = model.generate(**both, **told, eos_token_id=[padding]).logits[0]
    assert not torch.equal(ends[1], expected[0][1]) and mask.min() == 0


@families(most_engine_tests)
@torch.inference_mode()
def test_what_a_cache_of_a_pruned_prompt_is_good_for(model, ref):
    """It does not hold the prompt that its caller knows."""
    enable(model, 0.75)
    batch = inputs(ref, [ASK], [[synthetic_clip(16, seed=1)]])
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    for cached in (first.past_key_values, model(**batch).past_key_values):
        with pytest.raises(UnsupportedError, match="holds a pruned prompt"):
            model.generate(first.sequences, past_key_values=cached, max_new_tokens=2)


@families(most_engine_tests)
@torch.inference_mode()
def test_a_batch_that_is_no_shorter_for_being_pruned(model, ref):
    """Its longest row has no clip, so only the padding of the other changes."""
    enable(model, 0.75)
    clip = synthetic_clip(6, (56, 84), seed=1)
    batch = inputs(ref, [ASK, chat("Why? " * 60)], [[clip], []])
    out = model(**batch)
    mask = hf.last_batch(model).mask
    assert mask.shape == batch["attention_mask"].shape and not torch.equal(mask, batch["attention_mask"])
    token, one = out.logits[:, -1:].argmax(-1), torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="holds a pruned prompt"):
        model.generate(batch["input_ids"], past_key_values=out.past_key_values)
    with pytest.raises(RequestError, match="padded otherwise"):
        given = torch.cat([batch["attention_mask"], one], dim=1)
        model(input_ids=token, attention_mask=given, past_key_values=out.past_key_values)
    # With a mask, transformers wants to be told where a step stands.
    step = model(
        input_ids=token,
        attention_mask=torch.cat([mask, one], dim=1),
        position_ids=hf.last_batch(model).positions[:, :, -1:] + 1,
        past_key_values=out.past_key_values,
    ).logits
    alone = model(**inputs(ref, [ASK], [[clip]]))
    expected = model(input_ids=token[:1], past_key_values=alone.past_key_values).logits
    assert (step[0] - expected[0]).abs().max() < TOLERANCE


@families(most_engine_tests)
@torch.inference_mode()
def test_a_cache_of_a_text_is_as_without_evs(model, ref):
    """Also one of a fixed size, whose mask is longer than what it holds."""
    text = torch.tensor([[5, 6, 7, 8]])

    def step_after_text():
        static = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=20)
        mask = (torch.arange(20) < 4).long()[None]
        model(input_ids=text, past_key_values=static, attention_mask=mask, use_cache=True)
        mask[0, 4] = 1
        return model(input_ids=text[:, :1], past_key_values=static, attention_mask=mask, use_cache=True).logits

    enable(model, 0.75)
    ours = step_after_text()
    hf.disable(model)
    assert torch.equal(ours, step_after_text())


def test_nothing_is_told_of_a_call_of_which_nothing_was_asked(model, ref):
    hf.enable(model, 0.75, selection="paper")
    batch = inputs(ref, [ASK], [[synthetic_clip(16, seed=1)]])
    for call in (model, lambda **more: model.generate(max_new_tokens=1, **more)):
        call(**batch)
        assert hf.last_plans(model) and hf.last_batch(model)
        call(**batch, evs_rate=0)
        assert hf.last_plans(model) == []
        with pytest.raises(UnsupportedError, match="nothing was asked"):
            hf.last_batch(model)


def test_what_wrapped_the_model_is_not_taken_off(model, ref):
    stock = model.forward
    model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="forward of this model is wrapped already"):
        enable(model, 0.75)
    del model.forward
    enable(model, 0.75)
    enable(model, 0.5)  # its own methods are no wrap
    hf.disable(model)


def test_a_processor_is_told_by_one_call_and_left_by_the_last(model, ref):
    """It is watched as long as some call named it, and says what it says without EVS afterwards."""
    one, other = (copy.deepcopy(ref.processor) for _ in range(2))
    clip = synthetic_clip(8, seed=1)

    def cells(processor):
        made = processor(text=[ASK], videos=[[clip]], return_tensors="pt", do_sample_frames=False)
        return "evs_cells" in made

    hf.enable(model, 0.75, processor=one)
    hf.enable(model, 0.5)
    assert cells(one)
    hf.enable(model, 0.5, processor=other)
    assert not cells(one) and cells(other)
    hf.disable(model)
    assert not cells(other)
