# SPDX-License-Identifier: Apache-2.0
"""EVS inside transformers models against the independent reference: the same tokens kept, IDs, answers, logprobs."""

import copy

import pytest
import torch

import evs_vllm.hf as hf
from evs_vllm.core.scorers import Selection
from evs_vllm.errors import RequestError
from evs_vllm.families.front_end import CELLS, unwatch_processor
from evs_vllm.testing import synthetic_clip
from tests.families.registry import families, most_engine_tests
from tests.hf.harness import ASK, IMAGE, TOKENS, TOLERANCE, VIDEO, chat, check, enable, inputs, picture
from tests.reference.hf import Clip, Settings
from tests.reference.tower import TowerReference, TowerSettings
from tests.unit.device_copies import META, DeviceCopies


def untied(ref, make, settings):
    """A clip that the reference answers without a near tie: with the learned descriptor that depends on its numbers."""
    for seed in range(20):
        clip = make(seed)
        if ref.generate(ASK, [Clip(clip, settings=settings)], TOKENS).gap > 5 * TOLERANCE:
            return clip
    raise AssertionError("the reference is nearly tied whatever the clip")


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
@pytest.mark.parametrize("rate", [0.25, 0.75, 0.95])
def test_generate(model, ref, rate, positions):
    enable(model, rate, positions=positions)
    check(model, ref, [ASK], [[synthetic_clip(16, seed=1)]], Settings(rate, positions=positions))


def test_other_budgets_and_time(model, ref):
    enable(model, max_tokens=33, min_tokens_per_unit=1)
    clip = synthetic_clip(15, seed=3)
    check(model, ref, [ASK], [[clip]], Settings(max_tokens=33, min_tokens_per_unit=1), fps=3.2)
    check(model, ref, [ASK], [[clip]], Settings(threshold=3.0), evs_threshold=3.0, evs_max_tokens=None,
          evs_min_tokens_per_unit=0)  # fmt: skip


@families(most_engine_tests)
def test_the_default_selection(model, ref, facts):
    hf.enable(model, 0.75, processor=ref.processor)
    size = tuple(2 * facts.token_side * n for n in (2, 2))
    clip = untied(ref, lambda seed: synthetic_clip(16, size, seed=seed, noise=2), Settings(0.75, selection="learned"))
    check(model, ref, [ASK], [[clip]], Settings(0.75, selection="learned"))


@families(most_engine_tests)
def test_clips_that_are_resized_are_judged_as_they_were_before(model, ref):
    """By a batch's own processor, two clips of it, of odd sizes; without the processor nothing is guessed."""
    settings = Settings(0.6, selection="learned")
    clips = [untied(ref, lambda seed: synthetic_clip(9, (70, 101), seed=seed, noise=2), settings)]
    clips.append(untied(ref, lambda seed: synthetic_clip(6, (131, 64), seed=seed, noise=2), settings))
    hf.enable(model, 0.6)
    plain = copy.deepcopy(ref.processor)
    unwatch_processor(plain.video_processor)
    bare = copy.copy(ref)
    bare.processor = plain
    batch = inputs(bare, [ASK], [clips[:1]])
    assert CELLS not in batch
    with pytest.raises(RequestError, match=r"enable\(model, processor=processor\)"):
        model(**batch)
    with torch.no_grad():
        model(**batch, evs_selection="paper")
    hf.enable(model, 0.6, processor=ref.processor)
    check(model, ref, [ASK, ASK], [[clip] for clip in clips], settings)
    wrong = inputs(ref, [ASK], [clips[:1]])
    wrong[CELLS] = wrong[CELLS][:-1]
    with pytest.raises(RequestError, match="evs_cells has torch.uint8 of shape"):
        model(**wrong)
    hf.disable(model)
    assert CELLS not in inputs(ref, [ASK], [clips[:1]]), "undone"


def test_selections_by_model_and_by_call(model, ref):
    def one(settings, **kwargs):
        clip = untied(ref, lambda seed: synthetic_clip(10, (56, 84), seed=seed, noise=2), settings)
        check(model, ref, [ASK], [[clip]], settings, **kwargs)
        return hf.last_plans(model)[0].num_kept

    hf.enable(model, 0.9, selection="contrast", processor=ref.processor)
    assert one(Settings(0.9, selection="contrast")) == 6 + 2, "a short clip is no still picture"
    assert one(Settings(0.9, selection="learned"), evs_selection="learned") == 6 + 2
    assert one(Settings(0.9, selection="paper"), evs_selection="paper") == 6
    one(Settings(threshold=30.0, selection="contrast"), evs_threshold=30)
    hf.enable(model, threshold=30, selection="contrast", processor=ref.processor)
    batch = inputs(ref, [ASK], [[synthetic_clip(6, (56, 84))]])
    with pytest.raises(RequestError, match="threshold 30 is one of selection 'contrast' and means nothing to 'paper'"):
        model(**batch, evs_selection="paper")


def test_an_object_that_chooses(model, ref):
    class LastUnit(Selection):
        name = "last"

        def select(self, clip, config):
            first, tokens = clip.tokens_per_unit, clip.num_units * clip.tokens_per_unit
            return torch.tensor([*range(first), *range(tokens - first, tokens)])

    hf.enable(model, 0.5, selection=LastUnit())
    batch = inputs(ref, [ASK], [[synthetic_clip(8, (56, 84))]])
    with torch.no_grad():
        model(**batch)
        assert hf.last_plans(model)[0].counts.tolist() == [6, 0, 0, 6]
        with pytest.raises(RequestError, match="evs_selection is not possible here"):
            model(**batch, evs_selection="paper")


@pytest.mark.parametrize("refresh", [0, 0.1])
def test_encoder_reuse(model, model_dir, family, refresh):
    ref = TowerReference(model_dir(family))
    enable(model, 0.75, encoder="reuse", encoder_refresh=refresh, processor=ref.processor)
    media = [[synthetic_clip(16, seed=1, noise=2)], [synthetic_clip(2, (56, 140), seed=2)]]  # one is kept whole
    check(model, ref, [ASK, ASK], media, TowerSettings(0.75, refresh=refresh))
    plan = hf.last_plans(model)[0]
    assert plan.encoder == "reuse" and (len(plan.refreshed) > 0) == (refresh > 0)


@torch.inference_mode()
def test_reuse_off_the_cpu(model, ref, family, monkeypatch):
    """There it attends in padded batches, to the same end, after one copy of indices and without waiting."""
    from evs_vllm.core.schedule import ReuseSchedule, form_on
    from evs_vllm.hf import tower

    hf.enable(model, 0.75, encoder="reuse", processor=ref.processor)
    batch = inputs(ref, [ASK], [[synthetic_clip(16, seed=1, noise=2)]])
    want = model(**batch).logits
    (plan,) = hf.last_plans(model)
    visual = copy.deepcopy(model.model.visual).to(META)
    pixels = batch["pixel_values_videos"].to(META)
    with DeviceCopies() as device:
        embeds = tower.encode(visual, pixels, plan)
    assert len(embeds) == len(plan.computed) and (device.copies, device.waits) == (1, [])

    monkeypatch.setattr(tower, "form_on", lambda device: form_on(META))
    monkeypatch.setattr(ReuseSchedule, "_attend_clip", None)
    got = model(**batch).logits
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@families(most_engine_tests)
def test_batch_of_different_clips(model, ref):
    enable(model, 0.75)
    media = [[synthetic_clip(16, seed=1)], [synthetic_clip(9, (56, 140), seed=2)]]
    prompts = [ASK, chat(VIDEO, "What moves in the picture and where does it go? Answer with yes or no.")]
    for order in ((0, 1), (1, 0)):
        check(model, ref, [prompts[i] for i in order], [media[i] for i in order], Settings(0.75))


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_images_and_videos_mixed(model, ref, positions):
    enable(model, 0.75, positions=positions)
    prompts = [
        chat(IMAGE, "Compare with ", VIDEO, "What?", VIDEO, IMAGE, "And here?"),
        chat(VIDEO, "First the clip, then ", IMAGE, "the picture."),
        chat(IMAGE, "Describe the picture."),
    ]
    media = [
        [picture(1), synthetic_clip(5, seed=4), synthetic_clip(8, (56, 84), seed=5), picture(2)],
        [synthetic_clip(12, (84, 84), seed=6), picture(3)],
        [picture(4)],
    ]
    check(model, ref, prompts, media, Settings(0.75, positions=positions))


@families(most_engine_tests)
def test_the_comparison_can_fail(model, ref, monkeypatch):
    enable(model, 0.75)
    row = [ASK], [[synthetic_clip(16, seed=1)]]
    check(model, ref, *row, Settings(0.75))
    with pytest.raises(AssertionError):
        check(model, ref, *row, Settings(0.75, positions="sequential"))
    import evs_vllm.hf.prompt as prompt

    stock = prompt.lay_out

    def one_id_off(token_ids, items):
        ids, delta = stock(token_ids, items)
        ids[0, 10] += 1  # a token of unit 0, which stays
        return ids, delta

    monkeypatch.setattr(prompt, "lay_out", one_id_off)
    with pytest.raises(AssertionError):
        check(model, ref, *row, Settings(0.75))


def test_only_the_painted_token_is_kept(model, ref):
    """Through the real processor: pixels of one token change, and exactly that token stays beside unit 0."""
    enable(model, max_tokens=21)
    for unit, row, column in ((1, 0, 0), (3, 2, 4), (7, 3, 1)):
        frames = synthetic_clip(16, kind="static", seed=7)
        cell = frames[2 * unit :, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        cell[:] = 255 - cell
        with torch.inference_mode():
            model(**inputs(ref, [ASK], [[frames]]))
        (plan,) = hf.last_plans(model)
        assert plan.kept.tolist() == [*range(20), 20 * unit + 5 * row + column]


@families(most_engine_tests)
@torch.inference_mode()
def test_nothing_dropped_is_the_stock_model_bit_for_bit(model, ref):
    batch = inputs(ref, [ASK, chat(IMAGE, VIDEO)], [[synthetic_clip(30, seed=1)], [picture(1), synthetic_clip(8)]])
    labels = batch["input_ids"]
    stock = ref.model(**batch, labels=labels)
    answer = ref.model.generate(**batch, max_new_tokens=TOKENS)
    enable(model, 0)
    assert torch.equal(model(**batch, labels=labels).logits, stock.logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=TOKENS), answer)
    enable(model, 0.75)
    assert torch.equal(model(**batch, evs_rate=0, labels=labels).loss, stock.loss)
    assert model(**batch).logits.shape[1] < stock.logits.shape[1]
    text = ref.processor(text=[chat("Answer with yes or no.")], return_tensors="pt")
    assert torch.equal(model(**text).logits, ref.model(**text).logits)
    hf.disable(model)
    assert torch.equal(model(**batch).logits, stock.logits)
    assert not {"forward", "generate", "_evs"} & set(vars(model))


@torch.inference_mode()
def test_text_after_a_clip_resumes_as_served(model, ref, facts):
    """transformers 5 resumes at max(h, w), vLLM and the original model after the largest ID; we train the latter."""
    batch = inputs(ref, [ASK], [[synthetic_clip(30, seed=1)]])
    grid = batch["video_grid_thw"][0].tolist()
    places = (batch["input_ids"][0] == ref.video_id).nonzero().flatten()
    first, last = int(places[0]), int(places[-1])
    theirs, _ = model.model.get_rope_index(**{k: v for k, v in batch.items() if "pixel" not in k})
    step = facts.ids_per_second or 1  # IDs per unit of one second
    assert int(theirs[0, 0, last + 1]) == first + max(grid[1:]) // 2
    seen = {}

    def record(module, args, kwargs):
        seen["ids"] = kwargs["position_ids"]

    model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    expected = first + (grid[0] - 1) * step + 1
    for rate in (0, 0.75):
        enable(model, rate, served_positions=True)
        model(**batch)
        ids, stays = seen["ids"][:, 0], torch.from_numpy(hf.last_plans(model)[0].kept)
        after = first + len(stays)
        assert ids[:, after].tolist() == [expected] * 3
        # The clip itself is numbered alike by both.
        assert torch.equal(ids[:, first:after], theirs[:, 0, first : last + 1][:, stays])
