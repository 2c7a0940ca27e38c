# SPDX-License-Identifier: Apache-2.0
"""`evs-vllm demo`: what it starts, shows and ends, with a stand-in for vLLM; and once for real."""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from evs_vllm.cli import demo, main
from evs_vllm.config import EVSConfig
from evs_vllm.demo import INSTALL, answers, compare
from evs_vllm.serving import Answer
from evs_vllm.testing import real_clip_path
from evs_vllm.train.synthetic import TASKS

MARK = "EVS_TEST_MARK"
# `view` needs the real vLLM, and is tested elsewhere; here it only has to be run.
RUN = (
    "import sys; from evs_vllm.cli import demo, main\n"
    "demo._view_command = lambda args, *others: [sys.executable, '-c', f'open({str(args.output)!r}, \"w\")']\n"
    "sys.exit(main(sys.argv[1:]))"
)


class Demo:
    """Runs the demo in a process of its own, and finds every process that stems from it."""

    def __init__(self, tmp_path):
        fake = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
        fake.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("fake_vllm.py"), fake / "main.py")
        for folder in (fake, fake.parent, fake.parents[1]):
            (folder / "__init__.py").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (tmp_path / "temp").mkdir()
        self.temp, self.output, self.mark = tmp_path / "temp", tmp_path / "out.png", uuid.uuid4().hex
        self.env = os.environ | {MARK: self.mark, "PYTHONPATH": str(tmp_path / "path"), "TMPDIR": str(self.temp)}
        self.words = ["demo", "--model", str(tmp_path / "model"), "-o", str(self.output)]

    def start(self, *words, **env):
        command = [sys.executable, "-u", "-c", RUN, *self.words, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env | env, **pipes)

    def run(self, *words, **env):
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def processes(self):
        """Ids of live processes with our mark in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found


@pytest.fixture
def fake(tmp_path):
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc to find processes")
    made = Demo(tmp_path)
    yield made
    for process in made.processes():
        os.kill(process, signal.SIGKILL)


def test_side_by_side(fake):
    code, out, err = fake.run("--rate", "0.75", "--repeats", "2", "--", "--max-model-len", "99")
    assert code == 0, err
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["prompt tokens"][2:] == ["420", "120", "71.4", "%", "fewer"]
    assert rows["video tokens"][2:] == ["400", "100", "75.0", "%", "dropped"]
    assert float(rows["TTFT, median of 2"][-3].rstrip("x")) > 1.5
    assert rows["answer"][1:] == ['"a', 'bike"'] * 2 and "--evs-rate 0.75" in out
    assert "random" not in out, "said only of our own model"
    assert fake.output.exists() and fake.processes() == [] and list(fake.temp.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
@pytest.mark.parametrize("moment", ["starting", "asking"])
def test_a_signal_ends_everything(fake, number, moment):
    process = fake.start("--repeats", "100", EVS_FAKE="stall" if moment == "starting" else "")
    deadline = time.monotonic() + 30
    for line in process.stdout:
        if line.lstrip().startswith("server" if moment == "starting" else "first token"):
            break
    while len(fake.processes()) < 3 and time.monotonic() < deadline:  # demo, server, the server's stubborn child
        time.sleep(0.1)
    assert len(fake.processes()) == 3
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert fake.processes() == [] and list(fake.temp.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "words", "expected"),
    [
        ("die", (), "the server ended with code 1"),
        ("stall", ("--timeout", "3"), "the server was not healthy after 3 s"),
        ("refuse", (), "the server refused the request: HTTP 400: too long"),
    ],
)
def test_a_server_that_fails(fake, mode, words, expected):
    code, _, err = fake.run(*words, EVS_FAKE=mode)
    assert code == 2 and fake.processes() == []
    last = err.splitlines()[-1]
    assert last.startswith(f"evs-vllm demo: error: {expected}") and "Traceback" not in err
    logs = Path(re.search(r"\(logs: (.*)\)", last)[1])
    assert "arguments" in (logs / "dense.log").read_text()
    assert ("no memory for this model" in err) == (mode == "die")


def test_a_server_that_prunes_nothing_is_a_failure():
    run = compare.Run([Answer("a", 10, 1, 1.0)], None)
    with pytest.raises(ValueError, match="pruned no clip"):
        compare.report(run, run, "--evs-rate 0.5")


def test_long_answers_are_cut():
    assert compare.shorten("two\nbikes") == '"two bikes"'
    assert compare.shorten("w" * 50) == '"' + "w" * 37 + '..."'


def test_settings_become_words_of_vllm_serve():
    config = EVSConfig(threshold=3.5, positions="sequential", max_tokens=9)
    assert " ".join(demo._evs_words(config)) == "--evs-threshold 3.5 --evs-positions sequential --evs-max-tokens 9"


def test_answers_side_by_side():
    examples = answers.draw(7, seed=5)
    assert [e.task for e in examples] == [*TASKS, *TASKS[:2]]
    again = answers.draw(7, seed=5)
    assert all((a.frames == b.frames).all() and a.answer == b.answer for a, b in zip(examples, again))
    assert (answers.draw(1, seed=6)[0].frames != examples[0].frames).any()
    asked = [
        answers.Asked(e, tuple(Answer(e.answer if n < 2 else "?", 100 - 10 * n, 1, 0.1) for n in range(3)))
        for e in examples
    ]
    lines = [line.split("   ") for line in answers.report(asked)]
    rows = {line[0]: " ".join(line).split() for line in lines}
    assert rows["prompt tokens, mean"][-3:] == ["100", "90", "80"]
    assert rows["right"] == ["right", "7", "of", "7", "7", "of", "7", "0", "of", "7"]
    assert rows[examples[-1].question][-3:] == [examples[-1].answer, "?", "(wrong)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "-1"], "--repeats got -1"),
        (["--clips", "-1"], "--clips got -1"),
        (["--repeats", "0", "--clips", "0"], "nothing is left to show"),
        (["--repeats", "0", "--model", "m"], "nothing is left to show"),
    ],
)
def test_parts_that_are_left_out(words, message, capsys):
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "words", "named"),
    [
        ("scikit-video", [], "scikit-video"),
        ("av", [], "av"),
        ("scikit-video", ["--clips", "0"], "scikit-video"),
        ("av", ["--repeats", "0"], "av"),
    ],
)
def test_what_is_not_installed_is_named_first(missing, words, named, monkeypatch, capsys):
    found = importlib.metadata.distribution

    def distribution(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert main(["demo", *words]) == 2
    assert f"the demo needs {named}, which is not installed: {INSTALL}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.vllm
def test_right_answers_for_real(tmp_path, capfd, monkeypatch):
    """A real server, the trained model, clips that are new each time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["demo", "--repeats", "0", "--clips", "20"]) == 0
    text = capfd.readouterr().out
    right = re.search(r"^right +(\d+) of 20 +(\d+) of 20 +(\d+) of 20$", text, re.MULTILINE)
    assert right and min(map(int, right.groups())) >= 15, text
    tokens = re.search(r"^prompt tokens, mean +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    assert tokens and int(tokens[1]) - int(tokens[2]) == 192 - 48, text


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_for_real(model_dir, tmp_path, capfd, monkeypatch):
    """Real servers, a real video, the test suite's tiny model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, out = str(model_dir("qwen2_5_vl")), tmp_path / "demo.png"
    words = ["demo", "--model", model, "--video", str(real_clip_path("bikes")), "-o", str(out), "--repeats", "1"]
    limits = ["--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "4096"]
    assert main([*words, "--rate", "0.9", "--", *limits]) == 0
    text = capfd.readouterr().out
    # A short clip: 21 tokens of unit 0, and half of the share of the other nine units.
    assert re.search(r"video tokens +210 +31 +85.2 % dropped", text), text
    prompts = re.search(r"prompt tokens +(\d+) +(\d+)", text)
    assert int(prompts[1]) - int(prompts[2]) == 210 - 31
    assert out.stat().st_size > 20_000
