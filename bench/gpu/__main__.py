# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can say of evs-vllm, as one page.

Results of the kernels, their times, an engine's times and answers, vLLM's own pruning beside it, and what CUDA's
sanitizer finds.

Each step is a process of its own with a time limit, so that one that hangs or dies costs its own results only.

    python -m bench.gpu --output out/gpu                                        # Qwen2.5-VL-7B's shapes, dummy weights
    python -m bench.gpu --model Qwen/Qwen2.5-VL-7B-Instruct --output out/gpu
    python -m bench.gpu --device cpu --smoke                                    # the program itself, on tiny models

NOT RUN ON A GPU by the authors.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import harness, tables
from bench.gpu.step import Findings, read_findings

MARGIN_S = 15
"""A step begins no measurement in the last seconds before its limit."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: The module of this folder that does it.
        what: What it says, for the page.
        limit_s: When it is ended.
        again: Environment of a second attempt if the first one leaves no table: vLLM's older model runner.
    """

    name: str
    what: str
    limit_s: float
    again: tuple[tuple[str, str], ...] = ()


OLDER_RUNNER = (("VLLM_USE_V2_MODEL_RUNNER", "0"),)
STEPS = (
    Step("ops", "results of the kernels", 300),
    Step("kernels", "times of the kernels", 300),
    Step("engine", "where an engine's time goes", 900, OLDER_RUNNER),
    Step("numbers", "answers against a reference, FlashAttention, compiled models", 600, OLDER_RUNNER),
    Step("stock", "vLLM's own pruning", 600),
    Step("sanitizer", "memory and race errors of the kernels", 900),
)


@dataclass(frozen=True)
class Ran:
    """How a step ended, what it found and how long it took."""

    step: Step
    end: str
    findings: Findings
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, prints the page and writes it; 1 if a step failed or found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the page and the steps' logs; printed only by default")
    parser.add_argument("--model", metavar="NAME_OR_DIR", help="a checkpoint for the steps engine and stock")
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", default=",".join(names), help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="the smallest case of everything")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds for each step, instead of its own limit")
    args = parser.parse_args(argv)
    chosen = args.steps.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.device == "cuda" and not _sees_gpu():
        parser.error("torch finds no GPU here; --device cpu --smoke tries the program itself")
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu tries the program only, so it needs --smoke")
    environment = harness.environment() | ({"gpu": _gpu_name()} if args.device == "cuda" else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        words = ["--device", args.device]
        words += ["--smoke"] if args.smoke else []
        words += ["--model", args.model] if args.model else []
        ran = [run(step, words, folder, args.limit or step.limit_s) for step in STEPS if step.name in chosen]
        text = page(ran, environment, args.device, args.model)
        print(text)
        if args.output:
            (folder / "page.md").write_text(text, encoding="utf-8")
            print(f"written to {folder / 'page.md'}, the steps' output beside it")
    return 1 if any(one.end != "ok" or one.findings.problems for one in ran) else 0


def run(step: Step, words: Sequence[str], folder: Path, limit_s: float) -> Ran:
    """Runs a step to its end or its limit, a second time where that may help."""
    ran = attempt(step, words, folder, limit_s, {})
    if ran.end != "ok" and step.again and not any(table.rows for table in ran.findings.tables):
        first = ran
        ran = attempt(step, words, folder, limit_s, dict(step.again))
        how = " ".join(f"{name}={value}" for name, value in step.again)
        ran.findings.problems.insert(0, f"the first attempt {first.end}; this is a second one, with {how}")
    return ran


def attempt(step: Step, words: Sequence[str], folder: Path, limit_s: float, more: dict[str, str]) -> Ran:
    """One process. Its output is in a log of the folder, and its whole process group is gone afterwards."""
    file = folder / f"{step.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"bench.gpu.{step.name}", "--findings", str(file), *words]
    command += ["--seconds", str(max(limit_s - MARGIN_S, limit_s / 2))]
    print(f"{step.name}: {step.what}, at most {limit_s:.0f} s", file=sys.stderr, flush=True)
    started = time.monotonic()
    with (folder / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=harness.ROOT,
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            end = "ok" if code == 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            end = f"was stopped after {limit_s:.0f} s"
        finally:  # also what it started, and also on Ctrl-C
            _kill_group(process)
    return Ran(step, end, read_findings(file), time.monotonic() - started)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(ran: Sequence[Ran], environment: dict[str, object], device: str, model: str | None) -> str:
    """The page: what ran where, how each step ended, what is wrong, and all tables."""
    packages = environment["packages"]
    assert isinstance(packages, dict)
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [
        f"# evs-vllm on {environment['gpu'] if device == 'cuda' else 'a CPU: NO GPU, to try the program only'}",
        "",
        f"`{environment['command']}`, {environment['time_utc']}, commit {environment['commit']}"
        f"{', with uncommitted changes' if environment['uncommitted_changes'] else ''}. {versions}, "
        f"Python {environment['python']}. Model: {model or 'made by the steps, without trained weights'}.",
        "",
    ]
    rows = [
        (one.step.name, one.step.what, one.end, str(len(one.findings.problems)), f"{one.seconds:.0f}") for one in ran
    ]
    lines += tables.markdown(("step", "what", "end", "problems", "seconds"), rows, "lllrr")
    for one in ran:
        lines += ["", f"## {one.step.name}", ""]
        lines += [f"- **{problem}**" for problem in one.findings.problems]
        lines += [f"- {note}" for note in one.findings.notes]
        for table in one.findings.tables:
            lines += ["", f"{table.title}:", "", *tables.markdown(table.head, table.rows)]
        if not (one.findings.problems or one.findings.notes or one.findings.tables):
            lines.append(f"It found nothing; see `{one.step.name}.log`.")
    return "\n".join(lines) + "\n"


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
