# SPDX-License-Identifier: Apache-2.0
"""What the steps share: their arguments, and findings that survive a step that hangs or dies."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Table:
    """One table of the page.

    Attributes:
        title: What stands above it.
        head: The head of each column.
        rows: Cells as text.
    """

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass
class Findings:
    """What a step has found so far; written to `file` with everything that is added.

    Attributes:
        file: Where, or None for nowhere.
        tables: In their order.
        notes: Sentences that are no table.
        problems: What is wrong; a step without any is good.
    """

    file: Path | None = None
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def table(self, title: str, *head: str) -> None:
        """Begins a table."""
        self.tables.append(Table(title, list(head)))
        self._write()

    def row(self, *cells: object) -> None:
        """Adds a row to the last table."""
        self.tables[-1].rows.append([str(cell) for cell in cells])
        print(" | ".join(self.tables[-1].rows[-1]), flush=True)
        self._write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)
        self._write()

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"!! {text}", flush=True)
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({k: v for k, v in asdict(self).items() if k != "file"}), encoding="utf-8")
        part.replace(self.file)  # whoever reads it never finds half a file


def read_findings(file: Path) -> Findings:
    """What a step left, or no findings where it left nothing."""
    if not file.exists():
        return Findings()
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Findings(None, [Table(**table) for table in content["tables"]], content["notes"], content["problems"])


@dataclass
class Asked:
    """What a step is run with.

    Attributes:
        device: "cuda", or "cpu" where nothing but the program is tried.
        smoke: The smallest case of everything.
        model: A checkpoint's folder or name, or None for the steps' own models.
        findings: Where findings go.
        seconds: From the start, when no further measurement begins.
        started: When that was, by `time.perf_counter`.
    """

    device: str
    smoke: bool
    model: str | None
    findings: Findings
    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.started > self.seconds


def asked(description: str | None, argv: Sequence[str] | None = None) -> Asked:
    """Reads a step's command line, which `bench.gpu` writes; by hand, all of it may be left out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--findings", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args(argv)
    return Asked(args.device, args.smoke, args.model, Findings(args.findings), args.seconds)
