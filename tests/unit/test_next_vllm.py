# SPDX-License-Identifier: Apache-2.0
"""`make next`: what it unpacks, asks and says, with a wheel and processes that are made here."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_bootstrap import load

next_vllm = load("next_vllm")

METADATA = """Name: vllm
Requires-Dist: numpy>=1
Requires-Dist: torch==99.0
Requires-Dist: pytest<1; extra == "bench"
Requires-Dist: numba==0.1; sys_platform == "nowhere"
Requires-Dist: not-there-at-all>=3

The description.
"""
ROWS = [["a is wrapped", "vllm.a:A", "ok", "", "why a"], ["b is read", "vllm.b:B", "gone", "vllm.b:B is gone", "why b"]]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.engine.test_x" name="test_a"/>
<testcase classname="tests.engine.test_x" name="test_b[1]">
<failure message="assert 1 == 2&#10;more">long</failure></testcase>
<testcase classname="tests.engine.test_x" name="test_c"><error message="">no module</error></testcase>
<testcase classname="tests.engine.test_x" name="test_d"><skipped message="not here"/></testcase>
</testsuite></testsuites>"""
GOOD = '<testsuites><testsuite><testcase classname="t" name="a"/></testsuite></testsuites>'


def make_wheel(folder: Path) -> Path:
    wheel = folder / "vllm-0.99.0-cp38-abi3-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/__init__.py", "vllm/a/config.json", "vllm/_C.abi3.so", "vllm/csrc/x.cuh", "other/x.py"):
            archive.writestr(name, "")
        archive.writestr("vllm-0.99.0.dist-info/METADATA", METADATA)
    return wheel


class Processes:
    """Stands in for pip, the touchpoints and pytest."""

    def __init__(self, rows=ROWS, junit=JUNIT, touchpoints_code=0, pip_code=0):
        self.rows, self.junit, self.codes = rows, junit, (touchpoints_code, pip_code)
        self.seen = []

    def __call__(self, command, env=None):
        self.seen.append((command, env))
        if "pip" in command:
            if not self.codes[1]:
                make_wheel(Path(command[command.index("--dest") + 1]))
            return self.codes[1], "", "noise\nERROR: No matching distribution found for vllm==0.99.0\n"
        if "pytest" in command:
            if self.junit is not None:
                Path(command[-1].removeprefix("--junitxml=")).write_text(self.junit)
            return 1, "output of the tests", ""
        return self.codes[0], "a warning\n" + json.dumps(self.rows), "Traceback"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    monkeypatch.setattr(next_vllm, "ROOT", tmp_path)

    def run(processes):
        said = []
        code = next_vllm.main(["0.99.0"], run=processes, say=said.append)
        return code, "\n".join(said), tmp_path / "build" / "next" / "0.99.0"

    return run


def test_what_is_unpacked(tmp_path):
    requires = next_vllm.unpack(make_wheel(tmp_path), tmp_path / "python")
    files = sorted(f.relative_to(tmp_path / "python").as_posix() for f in (tmp_path / "python").rglob("*.*"))
    assert files == ["vllm/__init__.py", "vllm/a/config.json"], "no compiled code, no metadata"
    assert requires[1] == "torch==99.0" and len(requires) == 5


def test_requirements_that_are_not_met():
    versions = {"numpy": "2.3", "torch": "2.13.0+cpu", "pytest": "8", "numba": "0.65"}
    requires = [line.partition(": ")[2] for line in METADATA.splitlines() if line.startswith("Requires")]
    assert next_vllm.unmet(requires, versions.get) == [("torch==99.0", "2.13.0+cpu")]


def test_page_of_a_version_that_breaks(ask):
    processes = Processes()
    code, said, folder = ask(processes)
    assert code == 1 and said.startswith((folder / "page.md").read_text())
    assert "2 touchpoints: 1 gone, 1 ok." in said and "2 failed, 1 passed, 1 skipped" in said
    assert "| b is read | `vllm.b:B` | gone |" in said and "- vllm.b:B is gone: why b" in said
    assert "- tests.engine.test_x::test_b[1]: assert 1 == 2\n" in said and "test_c: no message" in said
    assert "NOT AS IT WAS" in said and (folder / "tests.log").read_text() == "output of the tests"
    for command, env in processes.seen[1:]:
        assert env["PYTHONPATH"].split(":")[0] == str(folder / "python"), command
        assert env["EVS_ALLOW_UNTESTED_VLLM"] == "1"


def test_page_of_a_version_that_does_not(ask):
    code, said, _ = ask(Processes(rows=ROWS[:1], junit=GOOD))
    assert code == 0 and "Nothing of what was looked at has changed." in said and "No engine" in said


def test_a_wheel_that_is_there_is_not_fetched_again(ask):
    ask(Processes())
    again = Processes()
    ask(again)
    assert not any("pip" in command for command, _ in again.seen)


@pytest.mark.parametrize(
    ("processes", "text"),
    [
        (Processes(pip_code=1), "pip finds no wheel of vLLM 0.99.0: ERROR: No matching distribution"),
        (Processes(touchpoints_code=1), "touchpoints could not be read:\nTraceback"),
        (Processes(junit=None), "pytest did not run:\noutput of the tests"),
    ],
    ids=["no wheel", "no touchpoints", "no tests"],
)
def test_what_cannot_be_said(ask, capsys, processes, text):
    code, said, folder = ask(processes)
    assert code == 2 and said == "" and text in capsys.readouterr().err
    assert not (folder / "page.md").exists()


def test_the_touchpoints_are_read_as_the_script_reads_them(capsys):
    exec(next_vllm.TOUCHPOINTS, {})
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 100 and {len(row) for row in rows} == {5}


def test_the_tests_that_it_runs_exist():
    for path in next_vllm.TESTS:
        assert (Path(__file__).parents[2] / path).exists()
