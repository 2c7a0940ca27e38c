# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plugin answers like the reference: same prompt tokens, same greedy tokens, same logprobs."""

from fractions import Fraction

import pytest

from evs_vllm.testing import real_clip_frames, synthetic_clip
from tests.e2e.harness import (
    IMAGE,
    TOLERANCE,
    VIDEO,
    Request,
    ask,
    chat,
    check,
    expected,
    run_and_check,
    sized,
)
from tests.families.registry import families, most_engine_tests
from tests.reference.hf import Clip, Picture, Settings

pytestmark = pytest.mark.vllm

SERVER = Settings(rate=0.75)


@pytest.fixture
def engine(engines, family):
    return engines.get(family, {"rate": 0.75, "request_overrides": "any"})


@pytest.fixture
def ref(reference, family):
    return reference(family)


@pytest.fixture
def clip(family):
    """Draws clips that reach the model without resizing; `size` is that for tokens of 28 x 28 pixels."""

    def make(seed=0, frames=16, size=(112, 140), noise=2, **kwargs):
        return synthetic_clip(frames, sized(family, size), seed=seed, noise=noise, **kwargs)

    return make


def picture(seed=0, size=(84, 112)):
    return Picture(synthetic_clip(1, size, "noise", seed=seed)[0])


def test_one_request_with_the_servers_setting(engine, ref, clip):
    ((output, result),) = run_and_check(engine, ref, [ask(clip(), SERVER)])
    assert result.grids == [(8, 4, 5)]
    assert len(result.kept[0]) == 40, "160 tokens at rate 0.75"
    assert output.prompt_token_ids.count(ref.video_id) == 40
    assert engine.metric("vllm:prompt_tokens") >= len(result.prompt_ids)


@families(most_engine_tests)
def test_real_video(engine, ref):
    frames = {name: real_clip_frames(name, 16) for name in ("bikes", "carphone_pristine")}
    for name, pixels in frames.items():
        ((_, result),) = run_and_check(engine, ref, [ask(pixels, SERVER)])
        units, rows, columns = result.grids[0]
        assert units == 8 and len(result.kept[0]) == units * rows * columns // 4, name


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
@pytest.mark.parametrize("rate", [0, 0.5, 0.75, 0.9, 0.99])
def test_rates_and_positions(engine, ref, clip, rate, positions):
    settings = Settings(rate=rate, positions=positions)
    ((_, result),) = run_and_check(engine, ref, [ask(clip(9), settings, evs_rate=rate, evs_positions=positions)])
    assert len(result.kept[0]) == max(20, int(160 * (1 - Fraction(str(rate)))))


@families(most_engine_tests)
@pytest.mark.parametrize("threshold", [0.5, 3.0, 40.0])
def test_threshold(engine, ref, clip, threshold):
    kept = set()
    for kind in ("moving", "static", "noise"):
        settings = Settings(threshold=threshold)
        ((_, result),) = run_and_check(engine, ref, [ask(clip(2, kind=kind), settings, evs_threshold=threshold)])
        kept.add(len(result.kept[0]))
    assert len(kept) > 1 or threshold == 0.5, "the count follows the content"


def test_minimum_and_maximum(engine, ref, clip):
    cases = {
        Settings(rate=0.9, min_tokens_per_unit=3): (20 + 7 * 3, {"evs_rate": 0.9, "evs_min_tokens_per_unit": 3}),
        Settings(rate=0.75, min_tokens_per_unit=1): (40, {"evs_min_tokens_per_unit": 1}),
        Settings(rate=0.5, max_tokens=33): (33, {"evs_rate": 0.5, "evs_max_tokens": 33}),
        Settings(rate=0.5, max_tokens=5): (20, {"evs_rate": 0.5, "evs_max_tokens": 5}),
        Settings(threshold=1.0, max_tokens=51): (51, {"evs_threshold": 1.0, "evs_max_tokens": 51}),
        Settings(threshold=255.0, min_tokens_per_unit=2): (34, {"evs_threshold": 255, "evs_min_tokens_per_unit": 2}),
    }
    for settings, (count, kwargs) in cases.items():
        ((_, result),) = run_and_check(engine, ref, [ask(clip(3), settings, **kwargs)])
        assert len(result.kept[0]) == count, settings


@families(most_engine_tests)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7])
def test_short_clips_and_odd_frame_counts(engine, ref, clip, facts, frames):
    frames = max(frames, facts.fewest_frames)
    requests = [
        ask(clip(4, frames), SERVER),
        ask(clip(4, frames), Settings(rate=0.4, positions="sequential"), evs_rate=0.4, evs_positions="sequential"),
    ]
    for _, result in run_and_check(engine, ref, requests):
        assert result.grids[0][0] == (frames + 1) // 2
        assert set(range(20)) <= set(result.kept[0].tolist()), "the first unit is whole"


@families(most_engine_tests)
def test_eight_requests_at_once_with_their_own_rates(engine, ref, clip):
    rates = [0, 0.1, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99]
    requests = []
    for i, rate in enumerate(rates):
        positions = "sequential" if i % 2 else "keep"
        settings = Settings(rate=rate, positions=positions)
        frames = clip(10 + i, 9 + i, size=(56 + 28 * (i % 3), 140))
        requests.append(ask(frames, settings, f"Question {i}?", evs_rate=rate, evs_positions=positions))
    run_and_check(engine, ref, requests)
    together = max(len({s.request_id for s in engine.steps[i : i + 8]}) for i in range(len(engine.steps)))
    assert together == 8, "the eight requests were not in flight together"


def test_static_and_noise_clips(engine, ref):
    # A static clip is one big tie: the lower flat indices stay.
    static = ask(synthetic_clip(8, kind="static", seed=5), Settings(rate=0.5), evs_rate=0.5)
    noise = ask(synthetic_clip(16, kind="noise", seed=5), SERVER)
    (_, first), (_, second) = run_and_check(engine, ref, [static, noise])
    assert first.kept[0].tolist() == list(range(40))
    assert len(second.kept[0]) == 40 and second.kept[0].tolist() != list(range(40))


ORDERS = {
    "image, video": (lambda clip: [picture(1), clip(20)], chat(IMAGE, VIDEO, "Compare the image with the video.")),
    "video, image": (
        lambda clip: [clip(21), picture(2)],
        chat(VIDEO, "First the clip, then ", IMAGE, "the picture. Why?"),
    ),
    "two videos": (
        lambda clip: [clip(22, 6), clip(23, 11)],
        chat(VIDEO, "Compare with ", VIDEO, "Which one is longer?"),
    ),
    "the same video twice": (lambda clip: [clip(24, 8), clip(24, 8)], chat(VIDEO, VIDEO, "Are these the same?")),
    "video, image, video, image": (
        lambda clip: [clip(25, 5), picture(3), clip(26, 8), picture(4, (56, 140))],
        chat(VIDEO, IMAGE, "What moves?", VIDEO, IMAGE, "And here?"),
    ),
    "image only": (lambda clip: [picture(5)], chat(IMAGE, "Describe the picture.")),
    "text only": (lambda clip: [], chat("Answer with yes or no.")),
}


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
@pytest.mark.parametrize("order", ORDERS)
def test_images_and_videos_in_any_order(engine, ref, clip, order, positions):
    drawn, prompt = ORDERS[order]
    items = drawn(clip)
    settings = Settings(rate=0.75, positions=positions)
    media = [m if isinstance(m, Picture) else Clip(m, settings=settings) for m in items]
    kwargs = {"evs_positions": positions} if positions != "keep" else None
    ((output, result),) = run_and_check(engine, ref, [Request(prompt, media, kwargs)])
    assert output.prompt_token_ids.count(ref.video_id) == sum(len(kept) for kept in result.kept)


@families(most_engine_tests)
def test_prompt_given_as_token_ids(engine, ref, clip):
    request = ask(clip(30), SERVER)
    request.prompt = ref.tokenizer(request.prompt)["input_ids"]
    run_and_check(engine, ref, [request])


@families(most_engine_tests)
def test_seconds_between_frames(engine, ref, clip, family):
    # Qwen2.5-VL numbers units by time: 0.625 s per unit is 2.5 IDs, cut to integers on the full clip, before gathering.
    request = ask(clip(31), SERVER)
    request.media = [Clip(request.media[0].frames, fps=3.2, settings=SERVER)]
    ((_, result),) = run_and_check(engine, ref, [request])
    if family == "qwen3_vl":  # writes the time of each unit into the prompt, to a tenth of a second
        text = ref.tokenizer.decode(result.prompt_ids)
        assert "<0.2 seconds>" in text and "<4.5 seconds>" in text and text.count(" seconds>") == 8
        return
    times = sorted(set(result.positions[0, 4:44] - 4))
    assert set(times) <= ({0, 2, 5, 7, 10, 12, 15, 17} if family == "qwen2_5_vl" else set(range(8)))


@families(most_engine_tests)
def test_the_comparison_can_fail(engine, ref, clip):
    """Small mistakes move logprobs far beyond the tolerance: the reference with such a mistake is no longer matched."""
    request = ask(clip(9), SERVER)
    (output,) = engine.generate([request])
    check(output, expected(ref, request))

    def wrong(media=request.media, distort=None):
        return ref.generate(request.prompt, media, request.max_tokens, distort)

    def one_id_off(ids):
        ids = ids.copy()
        ids[0, 30] += 1
        return ids

    mistakes = {
        "one position ID off by one": wrong(distort=one_id_off),
        "sequential instead of keep": wrong(
            [Clip(request.media[0].frames, settings=Settings(0.75, positions="sequential"))]
        ),
        "one pixel row of one frame": wrong([Clip(_scratched(request.media[0].frames), settings=SERVER)]),
    }
    for what, result in mistakes.items():
        first = output.outputs[0].logprobs[0]
        off = max(abs(entry.logprob - float(result.logprobs[0][token])) for token, entry in first.items())
        assert off > 10 * TOLERANCE, f"{what} moves the first logprobs by {off:.1e} only"
        with pytest.raises(AssertionError):
            check(output, result)


def _scratched(frames):
    frames = frames.copy()
    frames[0, 50] = 255 - frames[0, 50]
    return frames


def test_rate_is_read_as_a_decimal(engine, ref, clip):
    # 100 tokens at 0.9: 10 in decimals, 9 in binary floating point (100 * (1 - 0.9) is 9.999...).
    ((_, result),) = run_and_check(engine, ref, [ask(clip(6, 50, size=(28, 112)), Settings(rate=0.9), evs_rate=0.9)])
    assert result.grids == [(25, 1, 4)] and len(result.kept[0]) == 10
