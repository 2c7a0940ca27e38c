# SPDX-License-Identifier: Apache-2.0
"""Training end to end on tiny models: it prunes at the drawn rates, resumes to the bit, learns, and vLLM serves it."""

import json

import numpy as np
import pytest
import torch

import evs_vllm.hf as hf
from evs_vllm.cli import main
from evs_vllm.errors import ConfigError, UnsupportedError
from evs_vllm.options import SELECTION_NAMES
from evs_vllm.train import recipe
from evs_vllm.train.data import ChatCollator, DrawnDataset
from evs_vllm.train.rates import RateSampler, RateSettings
from evs_vllm.train.recipe import Recipe
from evs_vllm.train.trainer import answers
from tests.families.registry import families, most_engine_tests
from tests.reference.hf import Clip, Reference, Settings

UNITS = 5
TOKENS = 6 * UNITS
RATES = {"distribution": "list", "values": [0, 0.5, 0.75], "seed": 1}


def describe(model, output, steps=4, **changes):
    trainer = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes.pop("trainer", {}),
    }
    content = {
        "model": str(model),
        "data": {"synthetic": {"units": UNITS}, "train_clips": 16, "eval_clips": 4},
        "rates": RATES,
        "eval_rates": [0, 0.75],
        "trainer": trainer,
        **changes,
    }
    return Recipe.from_mapping(content)


@pytest.fixture
def tiny(model_dir, family):
    return model_dir(family)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@families(most_engine_tests)
def test_each_mini_batch_is_pruned_at_its_rate(tiny, tmp_path, monkeypatch):
    seen = []
    prune = hf.inputs.prune_batch

    def record(ids, mask, placeholders, images, clips):
        seen.append([plan.num_kept for _, plan in clips])
        return prune(ids, mask, placeholders, images, clips)

    monkeypatch.setattr(hf.inputs, "prune_batch", record)
    plan = describe(tiny, tmp_path, steps=3, trainer={"gradient_accumulation_steps": 2})
    trainer = recipe.run(plan)
    expected = RateSampler(plan.rates)
    assert trainer.drawn == [expected.draw() for _ in range(6)], "one rate a mini-batch, accumulated ones too"
    assert len(set(trainer.drawn)) > 1
    # A quarter of 30 tokens is 7, less than unit 0 and half of the others' share: 6 + 24 / 4 / 2.
    assert seen == [[{0: TOKENS, 0.5: 15, 0.75: 9}[rate]] * 2 for rate in trainer.drawn]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(np.isfinite(losses))
    assert list((tmp_path / "runs").rglob("events.*")), "TensorBoard"


@families(most_engine_tests)
def test_each_mini_batch_may_have_a_selection_of_its_own(tiny, tmp_path, monkeypatch):
    seen = []
    make_plan = hf.inputs.make_plan

    def record(clip, config, *args):
        seen.append((config.rate, config.selection))
        return make_plan(clip, config, *args)

    monkeypatch.setattr(hf.inputs, "make_plan", record)
    rates = {"distribution": "list", "values": [0.5, 0.75], "selections": ["paper", "contrast"], "seed": 2}
    trainer = recipe.run(describe(tiny, tmp_path, steps=6, rates=rates))
    sampler = RateSampler(RateSettings(**rates))
    expected = [(sampler.draw(), sampler.draw_selection()) for _ in range(6)]
    assert seen == [each for each in expected for _ in range(2)] and len(set(expected)) > 2, "two clips a batch"
    assert trainer.drawn == [rate for rate, _ in expected]


@families(most_engine_tests)
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_resuming_is_as_if_nothing_had_happened(tiny, tmp_path, lora):
    save = {"save_strategy": "steps", "save_steps": 3}
    whole = recipe.run(describe(tiny, tmp_path / "whole", steps=6, lora=lora, trainer=save))
    first = whole.drawn[:3]
    saved = json.loads((tmp_path / "whole" / "checkpoint-3" / "evs_rates.json").read_text())
    after_three = RateSampler(RateSettings(**RATES))
    assert [after_three.draw() for _ in range(3)] == first and after_three.state() == saved

    again = recipe.run(
        describe(tiny, tmp_path / "again", steps=6, lora=lora, trainer=save),
        resume=str(tmp_path / "whole" / "checkpoint-3"),
    )
    assert again.drawn == whole.drawn[3:] and len(again.drawn) == 3
    assert same(weights(again.model), weights(whole.model))
    other = describe(tiny, tmp_path / "again", steps=6, lora=lora, rates={**RATES, "seed": 2})
    with pytest.raises(ConfigError, match="Resume with the same"):
        recipe.run(other, resume=str(tmp_path / "whole" / "checkpoint-3"))
    with pytest.raises(ConfigError, match="No checkpoint"):
        recipe.run(describe(tiny, tmp_path / "nothing"), resume=True)


@families(most_engine_tests)
def test_lora_trains_adapters_only(tiny, tmp_path):
    import peft

    trained = recipe.run(describe(tiny, tmp_path, steps=3, lora={"r": 4, "alpha": 8}))
    base = Reference(tiny).model
    reference = base.state_dict()
    learned = 0
    for name, parameter in trained.model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name and "language_model" in name
            learned += int("lora_B" in name and parameter.abs().max() > 0)  # B starts at zero
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, reference[plain]), name
    assert learned == 3 * 7, "seven linear layers in each of three blocks"
    loaded = hf.enable(peft.PeftModel.from_pretrained(base, tmp_path), 0, served_positions=True)
    items = [DrawnDataset(trained.train_dataset.settings, 2, seed=9)[i] for i in range(2)]
    batch = ChatCollator(trained.processing_class)(items)
    with torch.no_grad():
        trained.model.eval()
        assert torch.equal(loaded(**batch, evs_rate=0.5).logits, trained.model(**batch, evs_rate=0.5).logits)


def test_frozen_vision_and_other_models(model_dir, tmp_path):
    tiny = model_dir("qwen2_vl")
    trained = recipe.run(describe(tiny, tmp_path, steps=1, freeze_vision=True))
    before, after = Reference(tiny).model.state_dict(), trained.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".visual." in name for name in changed)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedError, match="BertModel"):
        recipe.run(describe(tmp_path / "bert", tmp_path))
    with pytest.raises(ConfigError, match="trainer"):
        recipe.run(describe(tiny, tmp_path, trainer={"learning_speed": 1}))


@pytest.fixture(scope="module")
def learned(model_dir, tmp_path_factory):
    """A model that has learned eight clips by heart, at rates from 0 to 0.75, through the command line."""
    folder = tmp_path_factory.mktemp("learned")
    plan = describe(
        model_dir("qwen2_5_vl"),
        folder / "out",
        steps=60,
        data={"synthetic": {"units": UNITS}, "train_clips": 8, "eval_clips": 0},
        trainer={"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"},
    )
    content = {
        "model": plan.model,
        "data": {"synthetic": {"units": UNITS}, "train_clips": 8, "eval_clips": 0},
        "rates": RATES,
        "trainer": dict(plan.trainer),
    }
    (folder / "r.yaml").write_text(json.dumps(content))
    assert main(["uptrain", "--config", str(folder / "r.yaml")]) == 0
    return folder / "out"


def examples(learned):
    return DrawnDataset(recipe.SceneSettings(units=UNITS), 8, 0)


def test_it_learns(learned, model_dir):
    reference = Reference(learned)
    assert json.loads((learned / "config.json").read_text())["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    data = examples(learned)
    batch = ChatCollator(reference.processor)([data[i] for i in range(8)])
    untrained = hf.enable(Reference(model_dir("qwen2_5_vl")).model, 0, served_positions=True)
    model = hf.enable(reference.model, 0, served_positions=True)
    with torch.no_grad():
        for rate in (0, 0.5, 0.75):
            right, loss = answers(model, batch, rate)
            assert right.all() and loss < 0.5
            assert not answers(untrained, batch, rate)[0].any()
        # Right by row: one wrong label makes one row wrong.
        wrong = dict(batch, labels=batch["labels"].clone())
        place = (wrong["labels"][3] >= 0).nonzero()[0]
        wrong["labels"][3, place] = wrong["labels"][3, place] + 1
        assert answers(model, wrong, 0.75)[0].tolist() == [True] * 3 + [False] + [True] * 4
        # A batch without a clip, first and after one with clips, is answered as at any rate.
        talk = [{"role": role, "content": [{"type": "text", "text": "red"}]} for role in ("user", "assistant")]
        texts = ChatCollator(reference.processor)([{"messages": talk, "videos": [], "images": []}] * 2)
        right, loss = answers(model, texts, 0.75)
        fresh = hf.enable(Reference(learned).model, 0, served_positions=True)
        assert right.shape == (2,) and loss == answers(fresh, texts, 0)[1]


@pytest.mark.vllm
def test_vllm_serves_what_was_trained(learned):
    """The checkpoint through the engine: the learned answers, at every rate, as the reference gives them."""
    from tests.e2e.harness import Request, chat, start_engine, stop_engine

    reference, data = Reference(learned), examples(learned)
    # It was trained with the default selection, and is served with it.
    engine = start_engine(learned, {"rate": 0.75, "selection": SELECTION_NAMES[0], "request_overrides": "any"})
    try:
        for rate in (0.0, 0.5, 0.75):
            requests, expected = [], []
            for index in range(8):
                item = data[index]
                question, answer = (message["content"][-1]["text"] for message in item["messages"])
                system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                prompt = system + chat("<|vision_start|><|video_pad|><|vision_end|>", question)
                clip = Clip(item["videos"][0].frames, 2.0, Settings(rate, selection=SELECTION_NAMES[0]))
                ids = reference.tokenizer(answer + "<|im_end|>")["input_ids"]
                requests.append(Request(prompt, [clip], {"evs_rate": rate}, max_tokens=len(ids)))
                expected.append(ids)
                assert reference.generate(prompt, [clip], len(ids)).tokens == ids
            outputs = engine.generate(requests)
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    finally:
        stop_engine(engine)
