# SPDX-License-Identifier: Apache-2.0
"""The real server: `vllm serve` and its relatives answer like the reference, and refuse what they should."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evs_vllm.cli import main
from evs_vllm.config import EVSConfig
from evs_vllm.errors import EVSError
from evs_vllm.fingerprint import fingerprint
from evs_vllm.serving import metrics, video_part
from evs_vllm.testing import real_clip_frames, real_clip_path, synthetic_clip
from tests.e2e import evaluation
from tests.e2e.harness import IMAGE, MIN_GAP, TOLERANCE, VIDEO, chat, measured
from tests.e2e.server import (
    API_SERVER,
    COMMON,
    SERVE,
    SYSTEM,
    body,
    encode_frames,
    encode_image,
    started,
)
from tests.reference.hf import Clip, Picture, Settings

pytestmark = pytest.mark.vllm

PART, FRAMES = encode_frames(synthetic_clip(16, noise=2, seed=80))
QUESTION = "Describe the video."


def check_response(response, result, tokenizer):
    """The answer is the reference's: usage, ids, text and logprobs."""
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] == len(result.prompt_ids)
    assert answer["prompt_token_ids"] == result.prompt_ids
    assert result.gap > MIN_GAP
    (choice,) = answer["choices"]
    steps = choice["logprobs"]["content"]
    difference = max(
        abs(entry["logprob"] - float(result.logprobs[i][int(entry["token"].removeprefix("token_id:"))]))
        for i, step in enumerate(steps)
        for entry in [step, *step["top_logprobs"]]
    )
    assert choice["token_ids"] == result.tokens, f"largest logprob difference {difference:.1e}"
    assert choice["message"]["content"] == tokenizer.decode(result.tokens)
    assert difference <= TOLERANCE
    measured.append(difference)


class TestServe:
    """`vllm serve MODEL --evs-rate 0.75 --evs-request-overrides any`, both families."""

    @pytest.fixture(scope="class")
    def server(self, model_dir, family, tmp_path_factory):
        log = tmp_path_factory.mktemp("serve") / "log.txt"
        options = ["--evs-rate", "0.75", "--evs-encoder", "full", "--evs-request-overrides", "any"]
        options += ["--evs-selection", "paper"]
        with started([*SERVE, str(model_dir(family)), *COMMON, *options], log) as server:
            yield server

    @pytest.fixture
    def ref(self, reference, family):
        return reference(family)

    def test_the_servers_setting(self, server, ref):
        clip = Clip(FRAMES, fps=1, settings=Settings(0.75))
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [clip])
        assert len(result.kept[0]) == 40
        before = metrics(server.url)
        check_response(server.post(body([PART, QUESTION])), result, ref.tokenizer)
        after = metrics(server.url)
        counted = {name: after[name] - before.get(name, 0) for name in after}
        assert counted["evs:clips_total"] == 1
        assert counted["evs:video_tokens_total"] == 160
        assert counted["evs:video_tokens_kept_total"] == 40
        assert counted["evs:planning_time_seconds_count"] == 1

    def test_start_up_says_what_evs_will_do(self, server):
        lines = [line for line in server.log.splitlines() if "EVS" in line]
        assert any("75 %" in line for line in lines), lines

    def test_doctor_finds_the_server_and_this_installation_of_one_kind(self, server, capsys):
        assert main(["doctor", "--server", server.url, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["problems"] == [] and set(report["parts"]) == {"here", server.url}
        parts = report["parts"][server.url]
        assert parts == fingerprint(EVSConfig(rate=0.75, encoder="full", request_overrides="any", selection="paper"))
        assert f"fingerprint {parts['fingerprint']}." in server.log

    @pytest.mark.parametrize("name", ["bikes", "carphone_pristine"])
    def test_real_video_file(self, server, ref, name):
        # The server samples two frames per second.
        frames = {"bikes": 250, "carphone_pristine": 120}[name]
        seconds = {"bikes": 10, "carphone_pristine": 120 * 1001 / 30000}[name]
        count = int(seconds * 2) // 2 * 2
        picked = real_clip_frames(name, frames, step=1)[[int(i * frames / count) for i in range(count)]]
        clip = Clip(picked, fps=count / seconds, settings=Settings(0.75))
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [clip])
        check_response(server.post(body([video_part(real_clip_path(name)), QUESTION])), result, ref.tokenizer)

    @pytest.mark.parametrize(
        "kwargs, settings",
        [
            ({"evs_rate": 0}, Settings(0)),
            ({"evs_rate": 0.5}, Settings(0.5)),
            ({"evs_rate": 0.9, "evs_positions": "sequential"}, Settings(0.9, positions="sequential")),
            ({"evs_rate": 0.99}, Settings(0.99)),
            ({"evs_threshold": 4.5}, Settings(threshold=4.5)),
            ({"evs_min_tokens_per_unit": 2, "evs_rate": 0.9}, Settings(0.9, min_tokens_per_unit=2)),
        ],
        ids=str,
    )
    def test_settings_of_a_request(self, server, ref, kwargs, settings):
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [Clip(FRAMES, fps=1, settings=settings)])
        check_response(server.post(body([PART, QUESTION], mm_processor_kwargs=kwargs)), result, ref.tokenizer)

    def test_eight_at_once(self, server, ref):
        rates, requests, results = [0, 0.2, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99], [], []
        for i, rate in enumerate(rates):
            part, frames = encode_frames(synthetic_clip(8 + i, noise=2, seed=90 + i))
            requests.append(body([part, f"Question {i}?"], mm_processor_kwargs={"evs_rate": rate}))
            clip = Clip(frames, fps=1, settings=Settings(rate))
            results.append(ref.generate(SYSTEM + chat(VIDEO, f"Question {i}?"), [clip]))
        with ThreadPoolExecutor(8) as pool:
            for response, result in zip(pool.map(server.post, requests), results, strict=True):
                check_response(response, result, ref.tokenizer)

    def test_images_and_videos(self, server, ref):
        pixels = synthetic_clip(1, (84, 112), "noise", seed=81)[0]
        other, other_frames = encode_frames(synthetic_clip(7, noise=2, seed=82))
        parts = [encode_image(pixels), PART, "Compare ", other, "Why?"]
        media = [Picture(pixels), *(Clip(f, fps=1, settings=Settings(0.75)) for f in (FRAMES, other_frames))]
        result = ref.generate(SYSTEM + chat(IMAGE, VIDEO, "Compare ", VIDEO, "Why?"), media)
        check_response(server.post(body(parts)), result, ref.tokenizer)

    def test_streaming(self, server, ref):
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [Clip(FRAMES, fps=1, settings=Settings(0.75))])
        request = body([PART, QUESTION], stream=True, stream_options={"include_usage": True})
        lines = server.post(request).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        assert text == ref.tokenizer.decode(result.tokens)
        assert chunks[-1]["usage"]["prompt_tokens"] == len(result.prompt_ids)

    @pytest.fixture(scope="class")
    def local_task(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("local_task")
        return folder, evaluation.write_task(folder, 10)

    @pytest.mark.parametrize("rate", [0.0, 0.75])
    def test_evaluation_asks_like_anybody(self, server, ref, local_task, rate):
        _, questions = local_task
        letters = evaluation.letters_only(ref.tokenizer)
        expected = [evaluation.asked_plainly(server, question, rate, letters) for question in questions]
        before = metrics(server.url)
        answers, counted = evaluation.asked_by_the_client(server, questions, rate, letters)
        assert [(answer.text, answer.prompt_tokens) for answer in answers] == expected
        assert {answer.output_tokens for answer in answers} == {1}
        assert len({answer.prompt_tokens for answer in answers}) > 1, "questions must be told apart"
        after = metrics(server.url)
        assert counted == {name: after.get(name, 0) - before.get(name, 0) for name in counted}
        units = evaluation.UNITS
        tokens = [units * 6, max(6, int(units * 6 * (1 - rate)))] if rate else [0, 0]
        assert list(counted.values()) == [len(questions) * n for n in [bool(rate), *tokens]]

    def test_evaluation_passes_on_what_the_server_refuses(self, server, local_task):
        _, questions = local_task
        with pytest.raises(EVSError, match=r"HTTP 400 .*evs_rate.*1\.5"):
            evaluation.asked_by_the_client(server, questions, 1.5, {})
        with pytest.raises(EVSError, match="allowed-local-media-path"):
            evaluation.asked_by_the_client(server, questions, 0.5, {}, video_as="file")
        with pytest.raises(EVSError, match="does not serve 'another'"):
            evaluation.asked_by_the_client(server, questions, 0.5, {}, model="another")

    def test_evaluation_by_lmms_eval(self, server, ref, local_task, tmp_path):
        """The whole command with lmms-eval, and MVBench's own scoring."""
        pytest.importorskip("lmms_eval", reason='needs pip install "evs-vllm[eval]"')
        folder, questions = local_task
        letters = evaluation.letters_only(ref.tokenizer)
        content, table = evaluation.run_command(server, folder, tmp_path, letters, rates=[0.5, 0.9])
        assert content["complete"]
        assert [point["rate"] for point in content["points"]] == [0, 0.5, 0.9]
        full = None
        for point in content["points"]:
            plain = [evaluation.asked_plainly(server, question, point["rate"], letters) for question in questions]
            assert point["answers"] == [letter for letter, _ in plain]
            assert point["prompt_tokens"] == [tokens for _, tokens in plain]
            right = sum(question.gold == letter for question, (letter, _) in zip(questions, plain, strict=True))
            assert point["metrics"] == {"mvbench_accuracy": pytest.approx(100 * right / len(questions))}
            full = full or point
            assert point["video_tokens"] == (None if point is full else evaluation.UNITS * 6 * len(questions))
        assert f"| {evaluation.NAME} | default | 0.9 |" in table


NOT_A_NUMBER = st.one_of(
    st.text(max_size=8), st.booleans(), st.lists(st.integers(), max_size=2), st.just({}), st.just(None)
)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
BAD_VALUES = {
    "evs_rate": NOT_A_NUMBER | NOT_FINITE | st.floats(max_value=-1e-9) | st.floats(min_value=1),
    "evs_threshold": NOT_A_NUMBER | NOT_FINITE | st.floats(max_value=-1e-9) | st.floats(min_value=255.001),
    "evs_positions": st.one_of(
        st.text(max_size=10).filter(lambda t: t not in ("keep", "sequential")),
        st.integers(), st.none(), st.lists(st.just("keep"), max_size=2), st.just({"keep": 1}),
    ),
    "evs_min_tokens_per_unit": NOT_A_NUMBER | NOT_FINITE | st.integers(max_value=-1) | st.just(1.5),
    "evs_max_tokens": NOT_A_NUMBER.filter(lambda v: v is not None) | NOT_FINITE | st.integers(max_value=0),
}  # fmt: skip
UNKNOWN_KEY = st.text("abcdefghijklmnopqrstuvwxyz_0123456789-é", max_size=12).map("evs_".__add__)


@st.composite
def malformed(draw):
    """`mm_processor_kwargs` that no server takes, and a word that the refusal must contain."""
    kind = draw(st.sampled_from(["value", "unknown", "both"]))
    good = draw(st.sampled_from([{}, {"evs_rate": 0.9}, {"evs_positions": "keep"}]))
    if kind == "value":
        key = draw(st.sampled_from(sorted(BAD_VALUES)))
        return {**good, key: draw(BAD_VALUES[key])}, key
    if kind == "unknown":
        key = draw(UNKNOWN_KEY.filter(lambda k: k not in BAD_VALUES))
        return {**good, key: draw(st.sampled_from([0, 0.5, "keep", None]))}, key
    return {"evs_rate": draw(st.floats(0.01, 0.99)), "evs_threshold": draw(st.floats(0.01, 255))}, "contradict"


def refused(response, *words):
    """An HTTP 400 whose message has each of `words`."""
    assert response.status_code == 400, f"{response.status_code}: {response.text[:500]}"
    message = response.json()["error"]["message"]
    for word in words:
        assert word in message, message


class TestStricter:
    """The same options from a YAML file, `api_server` as a module, and the default `stricter`."""

    @pytest.fixture(scope="class")
    def server(self, model_dir, tmp_path_factory):
        folder = tmp_path_factory.mktemp("stricter")
        (folder / "server.yaml").write_text(
            "evs-rate: 0.5\nevs-max-tokens: 100\nevs-encoder: full\nevs-selection: paper\n"
        )
        command = [*API_SERVER, str(model_dir("qwen2_5_vl")), *COMMON, "--config", str(folder / "server.yaml")]
        with started(command, folder / "log.txt") as server:
            yield server

    @pytest.fixture
    def ref(self, reference):
        return reference("qwen2_5_vl")

    def still_serves(self, server, ref, kept=80, **kwargs):
        response = server.post(body([PART, QUESTION], **kwargs))
        assert response.status_code == 200, response.text
        assert response.json()["prompt_token_ids"].count(ref.video_id) == kept

    def test_file_and_module(self, server, ref):
        settings = Settings(0.5, max_tokens=100)
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [Clip(FRAMES, fps=1, settings=settings)])
        check_response(server.post(body([PART, QUESTION])), result, ref.tokenizer)
        assert len(result.kept[0]) == 80

    @pytest.mark.parametrize(
        "kwargs, kept",
        [
            ({"evs_rate": 0.5}, 80),
            ({"evs_rate": 0.75}, 40),
            ({"evs_max_tokens": 50}, 50),
            ({"evs_rate": 0.9, "evs_max_tokens": 100}, 20),
            ({"evs_positions": "sequential"}, 80),
        ],
        ids=str,
    )
    def test_less_is_allowed(self, server, ref, kwargs, kept):
        self.still_serves(server, ref, kept, mm_processor_kwargs=kwargs)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"evs_rate": 0},
            {"evs_rate": 0.49},
            {"evs_threshold": 10},
            {"evs_max_tokens": 101},
            {"evs_max_tokens": None},
            {"evs_min_tokens_per_unit": 1},
            {"evs_rate": 0.9, "evs_min_tokens_per_unit": 20},
            {"evs_selection": "learned"},
            {"evs_selection": "contrast", "evs_rate": 0.9},
        ],
        ids=str,
    )
    def test_more_is_refused(self, server, ref, kwargs):
        refused(server.post(body([PART, QUESTION], mm_processor_kwargs=kwargs)), "--evs-request-overrides", *kwargs)
        self.still_serves(server, ref)

    @pytest.mark.parametrize(
        "kwargs",
        [{"min_pixels": 784}, {"evs_rate": 0.9, "max_pixels": 10**9}, {"videos_kwargs": {"evs_rate": 0.1}}],
        ids=str,
    )
    def test_everything_else_stays_under_vllms_rule(self, server, ref, kwargs):
        refused(server.post(body([PART, QUESTION], mm_processor_kwargs=kwargs)), "--trust-request-mm-kwargs")
        self.still_serves(server, ref)

    @pytest.mark.parametrize("value", ["0.9", 0.9, ["evs_rate"], True, "{}"], ids=str)
    def test_kwargs_that_are_no_mapping(self, server, ref, value):
        assert server.post(body([PART, QUESTION], mm_processor_kwargs=value)).status_code == 400
        self.still_serves(server, ref)

    def test_fuzzed(self, server, ref):
        count = 0

        @settings(
            max_examples=120, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(malformed())
        def send(case):
            nonlocal count
            kwargs, word = case
            refused(server.post(body([PART, QUESTION], mm_processor_kwargs=kwargs)), word)
            refused(server.post(body(["What moves?"], mm_processor_kwargs=kwargs)), word)  # no clip at all
            count += 1

        send()
        assert count >= 100
        self.still_serves(server, ref)
        assert httpx.get(server.url + "/health", trust_env=False).status_code == 200
        assert "Traceback" not in server.log, "a refused request left a traceback in the log"


class TestOff:
    """Installed, and not asked for."""

    @pytest.fixture(scope="class")
    def server(self, model_dir, tmp_path_factory):
        log = tmp_path_factory.mktemp("off") / "log.txt"
        with started([*SERVE, str(model_dir("qwen2_5_vl")), *COMMON], log) as server:
            yield server

    def test_nothing_is_dropped(self, server, reference):
        ref = reference("qwen2_5_vl")
        result = ref.generate(SYSTEM + chat(VIDEO, QUESTION), [Clip(FRAMES, fps=1)])
        check_response(server.post(body([PART, QUESTION])), result, ref.tokenizer)
        assert len(result.kept[0]) == 160
        assert not [name for name in metrics(server.url) if name.startswith("evs:build_info")]
        assert metrics(server.url).get("evs:clips_total", 0) == 0
        assert not [line for line in server.log.splitlines() if "EVS" in line], "off should be silent"

    @pytest.mark.parametrize("kwargs", [{"evs_rate": 0.9}, {"evs_rate": 0}, {"evs_nonsense": 1}], ids=str)
    def test_evs_keys_are_refused(self, server, kwargs):
        refused(server.post(body([PART, QUESTION], mm_processor_kwargs=kwargs)), "evs")
        assert server.post(body([PART, QUESTION])).status_code == 200
