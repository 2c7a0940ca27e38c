# SPDX-License-Identifier: Apache-2.0
"""The GPU page: the program itself, on a CPU. A step that hangs, dies or finds something costs its own results only."""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import kernels, model, numbers, ops, sanitizer, step
from evs_kernels.testing import SPECS
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import clip_rows
from evs_vllm.core.schedule import ReuseSchedule, place

CPU = ["--device", "cpu", "--smoke"]


def asked(**changes):
    return step.Asked(
        **{"device": "cpu", "smoke": True, "model": None, "seconds": 60} | changes, findings=step.Findings()
    )


def test_one_command_one_page(tmp_path, capsys):
    """Two steps for real, in their own processes."""
    code = gpu.main([*CPU, "--steps", "ops,sanitizer", "--output", str(tmp_path)])
    text = (tmp_path / "page.md").read_text()
    assert code == 0 and text in capsys.readouterr().out, text
    assert "NO GPU" in text and "| ops | results of the kernels | ok | 0 |" in text
    for spec in SPECS:
        assert f"| {spec.name} |" in text
    assert "The sanitizer was not run: there is no GPU." in text and (tmp_path / "ops.log").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--device", "cpu"], "it needs --smoke"),
        ([*CPU, "--steps", "ops,nothing"], "no step nothing; there are ops, kernels"),
        pytest.param([], "finds no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)
def test_what_cannot_be_run(words, text, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert text in capsys.readouterr().err


BODIES = {
    "hangs": "asked.findings.row('a', 1); import time; time.sleep(60)",
    "dies": "asked.findings.row('a', 1); import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "raises": "raise RuntimeError('broken')",
    "finds": "asked.findings.row('a', 1); asked.findings.problem('something is wrong')",
    "second": "import os; os.environ['TRY'] == '2' or exit(3); asked.findings.row('a', 1)",
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Steps whose module is written here, in the place of the real ones."""
    (tmp_path / "bench").mkdir()
    package = tmp_path / "bench" / "gpu"
    package.mkdir()
    shutil.copy(step.__file__, package)
    begin = "from bench.gpu.step import asked as read\nasked = read('x')\nasked.findings.table('T', 'x', 'y')\n"
    for name, body in BODIES.items():
        (package / f"{name}.py").write_text(begin + body + "\n")
    monkeypatch.setattr(gpu.harness, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRY", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "end", "kept"),
    [("hangs", "was stopped after 3 s", 1), ("dies", "ended with code -9", 1), ("raises", "ended with code 1", 0)],
)
def test_a_step_that_does_not_end_well_keeps_what_it_found(made_up, name, end, kept):
    ran = gpu.run(gpu.Step(name, "x", 3), CPU, made_up, 3)
    assert ran.end == end and ran.seconds < 20
    assert sum(len(table.rows) for table in ran.findings.tables) == kept
    assert ("broken" in (made_up / f"{name}.log").read_text()) == (name == "raises")


def test_problems_decide_the_exit_code(made_up, monkeypatch, capsys):
    steps = (gpu.Step("finds", "x", 30), gpu.Step("raises", "y", 30))
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main([*CPU, "--steps", "finds"]) == 1
    out = capsys.readouterr().out
    assert "- **something is wrong**" in out and "| a | 1 |" in out
    assert gpu.main([*CPU, "--steps", "raises"]) == 1


def test_a_second_attempt_where_that_may_help(made_up):
    ran = gpu.run(gpu.Step("second", "x", 30, (("TRY", "2"),)), CPU, made_up, 30)
    assert ran.end == "ok" and "a second one, with TRY=2" in ran.findings.problems[0]
    assert ran.findings.tables[0].rows == [["a", "1"]]
    assert gpu.run(gpu.Step("second", "x", 30), CPU, made_up, 30).end == "ended with code 3"


def test_findings_are_there_after_every_line(tmp_path):
    found = step.Findings(tmp_path / "f.json")
    found.table("T", "a")
    found.row(1)
    found.note("n")
    found.problem("p")
    assert step.read_findings(tmp_path / "f.json") == step.Findings(None, found.tables, ["n"], ["p"])
    assert step.read_findings(tmp_path / "none.json") == step.Findings()


def test_a_wrong_kernel_is_found(monkeypatch):
    spec = SPECS[0]
    wrong = SimpleNamespace(**{**vars(spec), "op": lambda x, backend: spec.op(x, backend="ref") + (backend == "cpu")})
    run = asked()
    calls, differing = ops.compare(run, wrong, "cpu", torch.Generator().manual_seed(0))
    assert calls == differing == len(run.findings.problems) > 3
    assert ops.compare(asked(), spec, "cpu", torch.Generator().manual_seed(0)) == (calls, 0)


def test_kernels_are_timed():
    run = asked()
    kernels.main(run)
    (table,) = run.findings.tables
    assert run.findings.problems == [] and len(table.rows) == 10
    assert all(float(row[2]) >= float(row[3]) > 0 for row in table.rows)
    kernels.measure(run, "x", kernels.Timed("broken", lambda turn: 1 // 0, 1), 2)
    assert "broken of x: ZeroDivisionError" in run.findings.problems[0]


def test_the_sanitizer_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    run = asked(device="cuda")
    sanitizer.main(run)
    assert "not installed" in run.findings.notes[0] or sanitizer.find()
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    lines = ("import sys", "print('ERROR SUMMARY: 2 errors')", "sys.exit('racecheck' in sys.argv and 9)")
    tool.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
    tool.chmod(0o755)
    run = asked(device="cuda")
    sanitizer.main(run)
    assert run.findings.tables[0].rows == [["memcheck", "nothing found"], ["racecheck", "ERRORS FOUND"]]
    assert run.findings.problems == ["racecheck: ERRORS FOUND. ERROR SUMMARY: 2 errors"]


def test_shapes_of_the_7b_model(tmp_path):
    made = model.write_shapes(tmp_path / "m")
    config = json.loads((made / "config.json").read_text())
    assert not (made / "model.safetensors").exists()
    assert config["text_config"]["hidden_size"] == config["vision_config"]["out_hidden_size"] == 3584
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [16, 24, 24]
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(made).vision_config.depth == 32
    assert model.of("name", tiny=False) == ("name", "auto")


class TestAttention:
    """The check of FlashAttention, with plain attention in its place, right and wrong."""

    @staticmethod
    def checked(stock):
        plan = RetentionPlan((3, 4, 4), np.array([*range(16), 17, 20, 33, 34, 47]), encoder="reuse")
        schedule = ReuseSchedule([clip_rows(plan, 2)[0]], 4)
        place([schedule], "varlen", torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        query, key, value = torch.randn(3, 4 * len(plan.computed), 2, 8, generator=generator)
        checked = numbers.Checked(stock)
        checked(SimpleNamespace(scale=0.3), schedule, schedule.placed, query, key, value)
        assert checked.calls == 1
        return checked

    @staticmethod
    def plain(attention, schedule, form, query, key, value):
        return schedule.attend(query, key, value, attention.scale)

    def test_right(self):
        run, checked = asked(device="cuda"), self.checked(self.plain)
        numbers.judge_attention(run, "x", checked, expected=True)
        assert checked.worst < 1e-5 and run.findings.problems == []

    @pytest.mark.parametrize("error", [0.1, float("nan")])
    def test_wrong(self, error):
        run, checked = asked(device="cuda"), self.checked(lambda *given: self.plain(*given) + error)
        numbers.judge_attention(run, "x", checked, expected=True)
        assert "FlashAttention differs" in run.findings.problems[0]

    def test_not_called(self):
        run = asked(device="cuda")
        numbers.judge_attention(run, "x", numbers.Checked(self.plain), expected=True)
        assert "did not go through FlashAttention" in run.findings.problems[0]
        numbers.judge_attention(run, "x", numbers.Checked(self.plain), expected=False)
        assert len(run.findings.problems) == 1


def test_answers_that_differ_are_found():
    good = numbers.Answer([1, 2], [7, 8, 9], [-0.1, -0.2, -0.3])

    def problems(device, **changes):
        run = asked(device=device)
        run.findings.table("T", "x")
        numbers.compare(run, "e", ["r"], [dataclasses.replace(good, **changes)], [good])
        return run.findings.problems

    assert problems("cpu") == problems("cuda") == []
    assert problems("cuda", tokens=[7, 8, 1]) == [], "bf16 may turn a near tie"
    assert "other tokens from number 3 on" in problems("cpu", tokens=[7, 8, 1])[0]
    assert "differ by 5.0e-01" in problems("cuda", logprobs=[-0.1, -0.7, -0.3])[0]
    assert problems("cuda", tokens=[7, 1, 9], logprobs=[-0.1, -0.2, -0.9]) == [], "what follows cannot be compared"
    assert "another prompt" in problems("cuda", prompt=[1, 2, 3])[0]
    assert problems("cuda", logprobs=[-0.1, float("nan"), -0.3])
