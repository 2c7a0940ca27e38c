# SPDX-License-Identifier: Apache-2.0
"""bench/evaluate but for lmms-eval and vLLM: requests to a server that is made here, settings, checks, tables.

The same with real ones is in tests/e2e/test_server.py.
"""

import asyncio
import base64
import json
import subprocess
import sys
import types
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
from aiohttp import web

from bench.evaluate import __main__ as evaluate
from bench.evaluate import client as client_module
from bench.evaluate.__main__ import Settings, load_settings, measure
from bench.evaluate.client import Ask, Client, generation_of, openai_turns
from bench.evaluate.report import Point, markdown, rows_of
from evs_vllm.errors import EVSError
from tests.unit.local_server import LocalServer

ROOT = Path(__file__).resolve().parents[2]

TEXT, VIDEO = 20, 100


class FakeServer(LocalServer):
    """Counts tokens as vLLM with the plugin would, and is right about the first questions only: the fewer, the higher
    the rate."""

    def __init__(self, *, prunes=True, refused=(), others=0, metrics=True, models=("tiny",)):
        self.prunes, self.refused, self.others, self.metrics, self.models = prunes, refused, others, metrics, models
        self.seen, self.in_flight, self.most = [], 0, 0
        self.counts = {"evs:clips_total": 0, "evs:video_tokens_total": 0, "evs:video_tokens_kept_total": 0}
        super().__init__()

    def routes(self):
        return [
            web.get("/v1/models", self.list_models),
            web.post("/v1/chat/completions", self.answer),
            web.get("/metrics", self.show_metrics),
            web.get("/version", self.version),
        ]

    async def _json(self, content, status=200):
        return web.json_response(content, status=status)

    async def version(self, _):
        return await self._json({"version": "0.32.0"})

    async def list_models(self, _):
        return web.json_response({"object": "list", "data": [{"id": n, "object": "model"} for n in self.models]})

    async def show_metrics(self, _):
        if not self.metrics:
            return web.Response(status=404)
        lines = [f'{name}{{engine="{i}"}} {value / 2}' for name, value in self.counts.items() for i in range(2)]
        return web.Response(text="\n".join([*lines, 'evs:clips_total_created{a="b"} 5', "vllm:other 7"]))

    async def answer(self, request):
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.02)
        self.in_flight -= 1
        body = await request.json()
        self.seen.append(body)
        rate = body["mm_processor_kwargs"]["evs_rate"]
        if rate in self.refused:
            return await self._json({"error": {"message": f"evs_rate {rate} is not allowed here", "code": 400}}, 400)
        kept = int(VIDEO * (1 - Fraction(str(rate)))) if self.prunes else VIDEO
        if rate:
            grown = 1 + self.others, VIDEO * (1 + self.others), kept * (1 + self.others)
            self.counts = {name: old + new for (name, old), new in zip(self.counts.items(), grown, strict=True)}
        number = int(body["messages"][0]["content"][-1]["text"].split()[-1])
        text = "right" if number < 8 * (1 - rate) else f"wrong at {rate}"
        usage = {"prompt_tokens": TEXT + number + kept, "completion_tokens": 2, "total_tokens": 0}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        return await self._json({**content, "usage": usage})


class FakeTasks:
    """Stands for `lmms.Tasks`: eight questions a task about one video."""

    def __init__(self, video, failing=()):
        self.video, self.failing, self.ran = video, failing, []

    def run(self, name, client, options, limit, max_tokens):
        self.ran.append((name, options["evs_rate"]))
        if name in self.failing:
            raise EVSError(f"lmms-eval could not run {name}: no data")
        answers = client.run(asks(self.video, limit or 8), options)
        right = sum(answer.text == "right" for answer in answers)
        metrics = {"accuracy": 100 * right / len(answers), "other": float(right)}
        return types.SimpleNamespace(metrics=metrics, answers=answers, videos=len(answers))


def asks(video, count):
    def turns(number):
        parts = [{"type": "video", "url": str(video)}, {"type": "text", "text": f"Question {number}"}]
        return [{"role": "user", "content": parts}]

    return [Ask(turns(number), {"max_tokens": 4, "temperature": 0}) for number in range(count)]


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a clip.mp4"
    path.write_bytes(b"not looked into")
    return path


def run(server, video, tasks=None, **settings):
    settings = Settings(tasks=["one"], **settings)
    client = Client(server.url, concurrency=3)
    groups = settings.groups
    return groups, list(measure(settings, tasks or FakeTasks(video), client, groups))


def content_of(groups, points, **more):
    environment = {"time_utc": "2026-11-23T00:00:00Z", "command": "python -m bench.evaluate x.yaml"}
    server = {"model": "tiny", "vllm": "0.32.0", "lmms_eval": "0.7.3"}
    return {
        "schema": 1, "settings": {}, "groups": groups, "environment": environment, "server": server, "complete": True,
        "points": json.loads(json.dumps([asdict(point) for point in points])), **more,
    }  # fmt: skip


# requests


def test_requests_say_what_was_asked(video):
    with FakeServer() as server:
        client = Client(server.url + "/v1/", concurrency=3, body={"media_io_kwargs": {"video": {"num_frames": 4}}})
        answers = client.run(asks(video, 7), {"evs_rate": 0.75, "evs_positions": "sequential"})
        assert [answer.prompt_tokens for answer in answers] == [TEXT + number + 25 for number in range(7)], "order"
        assert server.most == 3
    body = server.seen[0]
    assert body["model"] == "tiny"
    assert body["mm_processor_kwargs"] == {"evs_rate": 0.75, "evs_positions": "sequential"}
    assert body["media_io_kwargs"] == {"video": {"num_frames": 4}}
    assert (body["max_tokens"], body["temperature"]) == (4, 0)
    url = body["messages"][0]["content"][0]["video_url"]["url"]
    kind, data = url.split(";base64,")
    assert kind == "data:video/mp4"
    assert base64.b64decode(data) == b"not looked into"


def test_videos_as_paths_and_urls(video):
    turns = asks(video, 1)[0].turns
    (turn,) = openai_turns(turns, "file")
    assert turn["content"][0]["video_url"]["url"] == video.as_uri()
    assert " " not in video.as_uri()
    for url in ("http://somewhere/a.mp4", "data:video/mp4;base64,AAAA"):
        part = {"type": "video", "url": url}
        assert openai_turns([{"role": "user", "content": [part]}], "file")[0]["content"][0]["video_url"]["url"] == url


@pytest.mark.parametrize(
    "part, words",
    [
        ({"type": "video", "url": "/nowhere/a.mp4"}, "no such video: /nowhere/a.mp4"),
        ({"type": "video", "url": str(ROOT)}, "folder of frames"),
        ({"type": "image", "url": "a.png"}, "EVS prunes videos"),
        ({"type": "video", "url": {"video_start": 1}}, r"'video' \(dict\)"),
    ],
    ids=["missing", "folder", "image", "cut"],
)
def test_what_is_no_video_file_is_refused(part, words):
    with FakeServer() as server, pytest.raises(EVSError, match=words):
        Client(server.url).run([Ask([{"role": "user", "content": [part]}], {})], {"evs_rate": 0.5})
    assert not server.seen


def test_the_servers_words_are_passed_on(video):
    with FakeServer(refused=(0.9,)) as server:
        with pytest.raises(EVSError, match=r"HTTP 400 from .*: evs_rate 0\.9 is not allowed here"):
            Client(server.url).run(asks(video, 5), {"evs_rate": 0.9})
        with pytest.raises(EVSError, match="does not serve 'big'; it serves tiny"):
            Client(server.url, "big")
    with pytest.raises(EVSError, match="no server answers at .*vllm serve MODEL"):
        Client(server.url)
    with FakeServer(models=("a", "b")) as server:
        with pytest.raises(EVSError, match="serves a, b: say which"):
            Client(server.url)
        assert Client(server.url, "b").model == "b"


def test_generation_in_the_apis_names():
    mvbench = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation_of(mvbench, None) == {"max_tokens": 16, "temperature": 0}
    assert generation_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "\n"}, 512) == {
        "max_tokens": 512, "temperature": 0.7, "top_p": 0.9, "stop": ["\n"],
    }  # fmt: skip
    with pytest.raises(EVSError, match="num_beams 4"):
        generation_of({"num_beams": 4}, None)


# measuring


def test_rates_accuracy_and_tokens(video):
    with FakeServer() as server:
        groups, points = run(
            server, video, rates=[0.75, 0.5], variants={"default": {}, "full": {"evs_encoder": "full"}}
        )
    assert [(point.variant, point.rate) for point in points] == [
        ("", 0), ("default", 0.5), ("default", 0.75), ("full", 0.5), ("full", 0.75),
    ]  # fmt: skip
    assert [point.error for point in points] == [None] * 5
    assert [point.metrics["accuracy"] for point in points] == [100, 50, 25, 50, 25]
    assert [(point.video_tokens, point.video_tokens_kept) for point in points[:3]] == [
        (None, None), (800, 400), (800, 200),
    ]  # fmt: skip
    kwargs = [body["mm_processor_kwargs"] for body in server.seen]
    assert sum(options == {"evs_rate": 0.75, "evs_encoder": "full"} for options in kwargs) == 8
    assert sum(options == {"evs_rate": 0} for options in kwargs) == 8
    rows = rows_of(groups, points)
    mean = TEXT + 3.5
    assert [row.prompt_tokens for row in rows[:3]] == [mean + 100, mean + 50, mean + 25]
    assert [(row.relative, row.changed) for row in rows[:3]] == [(None, None), (0.5, 0.5), (0.25, 0.75)]
    assert [(row.tokens, row.kept) for row in rows[:3]] == [(None, None), (100, 50), (100, 25)]
    table = markdown(content_of(groups, points)).splitlines()
    assert table[2] == "| one |  | 0 | 100 |  |  | 124 |  |  |"
    assert table[4] == "| one | default | 0.75 | 25 | 25.0 % | 75.0 % | 48 | 100 | 25 |"
    assert "| one | other | 8 | 4 | 2 | 4 | 2 |" in table


def test_a_server_that_prunes_nothing_gives_no_figures(video):
    with FakeServer(prunes=False) as server:
        groups, points = run(server, video, rates=[0.5])
    assert points[0].error is None
    assert "pruned nothing at rate 0.5" in points[1].error
    table = markdown(content_of(groups, points))
    assert "| one | default | 0.5 | no figure: one: the prompts are as long as at rate 0" in table


@pytest.mark.parametrize("options", [{"others": 1}, {"metrics": False}], ids=str)
def test_counters_of_others_are_not_shown(video, options):
    with FakeServer(**options) as server:
        groups, points = run(server, video, rates=[0.5])
    assert [(point.error, point.video_tokens, point.video_tokens_kept) for point in points] == [(None, None, None)] * 2
    assert "| one | default | 0.5 | 50 | 50.0 % | 50.0 % | 74 |  |  |" in markdown(content_of(groups, points))


def test_counters_that_contradict_the_prompts(video):
    with FakeServer() as server:
        _, points = run(server, video, rates=[0.5])
    points[1].video_tokens_kept -= 1
    assert "400 tokens shorter, /metrics says 401" in evaluate.failure(points[1], points[0])
    points[1].prompt_tokens[3] = 1000
    assert "longer than at rate 0" in evaluate.failure(points[1], points[0])
    points[1].questions -= 1
    assert "7 questions, and 8 at rate 0" in evaluate.failure(points[1], points[0])


def test_one_failure_does_not_cost_the_rest(video):
    with FakeServer(refused=(0.5,)) as server:
        tasks = FakeTasks(video, failing=("two",))
        settings = Settings(tasks=[{"both": ["one", "two"]}, "one"], rates=[0.5, 0.75])
        points = list(measure(settings, tasks, Client(server.url), settings.groups))
    assert tasks.ran == [("one", 0), ("one", 0.5), ("one", 0.75), ("two", 0)], "asked once; nothing without rate 0"
    assert "HTTP 400" in points[1].error and points[2].error is None
    rows = {(row.group, row.rate): row for row in rows_of(settings.groups, points)}
    assert rows["both", 0].error == "two: lmms-eval could not run two: no data"
    assert rows["both", 0.75].error == "1 of 2 tasks so far"
    assert rows["one", 0.75].accuracy == 25


def test_groups_are_plain_means_of_tasks():
    def point(task, rate, accuracy, tokens, answers):
        return Point(
            task, "default" if rate else "", rate, metrics={"m": accuracy}, questions=len(tokens), videos=len(tokens),
            prompt_tokens=tokens, answers=answers, video_tokens=10 * len(tokens) if rate else None,
            video_tokens_kept=4 * len(tokens) if rate else None,
        )  # fmt: skip

    points = [
        point("a", 0, 80.0, [100, 100, 100], ["x", "y", "z"]), point("b", 0, 40.0, [60], ["x"]),
        point("a", 0.6, 60.0, [40, 40, 40], ["x", "y", "-"]), point("b", 0.6, 30.0, [20], ["x"]),
    ]  # fmt: skip
    zero, pruned = rows_of({"both": ["a", "b"]}, points)
    assert (zero.accuracy, zero.questions, zero.prompt_tokens) == (60, 4, 90)
    assert (pruned.accuracy, pruned.relative, pruned.changed) == (45, 0.75, 0.25)
    assert (pruned.tokens, pruned.kept) == (10, 4)
    table = markdown(content_of({"both": ["a", "b"]}, points))
    assert "| b | m | 40 | 30 |" in table
    assert "both is the plain mean of 2 tasks" in table
    wrong_everywhere = [Point(**(asdict(p) | {"metrics": {"m": 0.0}})) for p in points]
    assert rows_of({"both": ["a", "b"]}, wrong_everywhere)[1].relative is None


# settings, files, the command


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_files_load(path):
    settings = load_settings(path)
    assert settings.rates[0] == 0
    assert len(list(settings.cells())) == 1 + (len(settings.rates) - 1) * len(settings.variants)
    assert "NOT RUN YET" in path.read_text()
    assert f"configs/eval/{path.name}" in path.read_text()


def test_every_benchmark_has_a_file():
    names = {path.stem for path in (ROOT / "configs" / "eval").glob("*.yaml")}
    assert names >= {"videomme", "mvbench", "tempcompass", "longvideobench", "mlvu"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("tasks: [a]\nrate: [0.5]", r"unknown keys \['rate'\]; known: tasks, rates"),
        ("rates: [0.5]", "tasks"),
        ("tasks: []", "at least one"),
        ("tasks: [a]\nrates: [1]", "up to but not including 1"),
        ("tasks: [a]\nrates: [many]", "many"),
        ("tasks: [a]\nlimit: 0", "at least 1"),
        ("tasks: [a]\nvariants: {x: {evs_rate: 0.1}}", "without evs_rate"),
        ("tasks: [a]\nbody: {mm_processor_kwargs: {}}", "rates and variants"),
    ],
)
def test_bad_settings_say_what_is_wrong(text, words, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(EVSError, match=words):
        load_settings(path)


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("tasks: [a]\nrates: [0.5]\nlimit: 3")
    settings = load_settings(path, {"tasks": ["b"], "rates": None, "limit": 7})
    assert (settings.groups, settings.rates, settings.limit) == ({"b": ["b"]}, [0, 0.5], 7)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    return evaluate.main()


def test_without_lmms_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "lmms", raising=False)
    assert command(monkeypatch, ROOT / "configs" / "eval" / "videomme.yaml") == 1
    error = capsys.readouterr().err
    assert "lmms_eval" in error and 'pip install "evs-vllm[eval]"' in error


def test_writes_and_resumes(monkeypatch, capsys, video, tmp_path):
    fake = FakeTasks(video)
    fake.parts = lambda name: [name]
    lmms = types.SimpleNamespace(Tasks=lambda names, folders, prompts: fake)
    monkeypatch.setattr(evaluate, "bridge", lambda: (client_module, lmms))
    monkeypatch.setattr(evaluate.importlib.metadata, "version", lambda name: "0.7.3")
    settings, out = tmp_path / "settings.yaml", tmp_path / "out" / "result"
    settings.write_text("tasks: [one]\nrates: [0.5, 0.75]\n")
    with FakeServer(refused=(0.75,)) as server:
        assert command(monkeypatch, settings, "--url", server.url, "--out", out) == 1
    assert "no figure: HTTP 400" in capsys.readouterr().out
    content = json.loads(out.with_suffix(".json").read_text())
    assert (content["schema"], content["complete"], content["server"]["vllm"]) == (1, False, "0.32.0")
    assert "**not complete**" in out.with_suffix(".md").read_text()
    fake.ran.clear()
    with FakeServer() as server:
        assert command(monkeypatch, settings, "--url", server.url, "--out", out, "--resume") == 0
        assert fake.ran == [("one", 0.75)]
        table = out.with_suffix(".md").read_text()
        assert "| one | default | 0.75 | 25 | 25.0 % | 75.0 % | 48 | 100 | 25 |" in table
        assert "not complete" not in table
        picture = out.with_suffix(".svg").read_text()
        assert "<svg" in picture
        rows = json.loads(out.with_suffix(".json").read_text())["points"]
        assert [row["rate"] for row in rows] == [0, 0.5, 0.75]
        assert command(monkeypatch, settings, "--url", server.url, "--out", out, "--resume", "--limit", 2) == 1
    assert "has another 'settings'" in capsys.readouterr().err


def test_needs_no_vllm_and_no_torch():
    names = "'vllm' in sys.modules, 'torch' in sys.modules"
    code = f"import sys, bench.evaluate.__main__, bench.evaluate.client; print({names})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# with lmms-eval, where it is installed


@pytest.fixture(scope="module")
def tasks_of_files():
    pytest.importorskip("lmms_eval", reason='needs pip install "evs-vllm[eval]"')
    from bench.evaluate import lmms

    files = [load_settings(path) for path in sorted((ROOT / "configs" / "eval").glob("*.yaml"))]
    names = [part for settings in files for parts in settings.groups.values() for part in parts]
    return names, lmms.Tasks([*names, "mvbench"], [], "default")


def test_lmms_eval_knows_the_tasks(tasks_of_files):
    names, tasks = tasks_of_files
    assert all(tasks.parts(name) == [name] for name in names)
    parts = tasks.parts("mvbench")
    assert len(parts) == 20 and set(parts) > {name for name in names if name.startswith("mvbench")}
    for name in names:
        config = tasks._manager._get_config(name)
        assert config["output_type"] == "generate_until" if "output_type" in config else True
        assert config["metric_list"]


def test_lmms_eval_tasks_that_cannot_run_say_why(tasks_of_files, tmp_path):
    from bench.evaluate import lmms

    _, tasks = tasks_of_files
    with FakeServer() as server:
        client = Client(server.url)
        with pytest.raises(EVSError, match="lmms-eval could not run videomme: "):
            tasks.run("videomme", client, {"evs_rate": 0}, 2, None)  # no hub in the tests
    assert not server.seen
    with pytest.raises(EVSError, match="knows no task mvbench_acton_count; there are .*mvbench_action_count"):
        lmms.Tasks(["mvbench_acton_count"], [], "default")
    with pytest.raises(EVSError, match="no such task_folders: .*nowhere"):
        lmms.Tasks(["a"], [tmp_path / "nowhere"], "default")
    model = lmms.ServedModel(client, {}, None)
    with pytest.raises(EVSError, match="log-likelihoods"):
        model.loglikelihood([])
