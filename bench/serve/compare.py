# SPDX-License-Identifier: Apache-2.0
"""Compares two result files of `serve.py`, point by point: B against A.

    python -m bench.serve.compare A.json B.json

Exit code 1: a point of B is worse than A's by more than ``--tolerance`` and by more than both spreads, or B has an
error where A has none.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.common import tables
from bench.serve.measurements import Cell

# Figure, its spread, whether less is better.
FIGURES = (("ttft_p50_s", "ttft_spread_s", True), ("requests_per_s", "requests_per_s_spread", False))
HEAD = ("cell", "row", "TTFT A s", "TTFT B s", "B/A", "requests/s A", "requests/s B", "B/A", "")
NO_FIGURES = ("",) * 6


def main() -> int:
    """Parses the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share that is not called worse (default: 0.1)")
    args = parser.parse_args()
    lines, worse = compare(*(json.loads(path.read_text()) for path in (args.a, args.b)), tolerance=args.tolerance)
    print("\n".join(lines))
    return 1 if worse else 0


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.1) -> tuple[list[str], int]:
    """A Markdown table, and how many points of B are worse.

    Raises:
        ValueError: the files are not of the same kind and schema.
    """
    for key in ("schema_version", "kind"):
        if a[key] != b[key]:
            raise ValueError(f"{key} differs: {a[key]!r} and {b[key]!r}")
    lines = [f"B differs from A in {what}.\n" for what in _differences(a, b)]
    rows = []
    points = {_key(point): point for point in a["results"]}
    worse = 0
    for point in b["results"]:
        other = points.pop(_key(point), None)
        name = (Cell(**point["cell"]).label, point["row"])
        if other is None:
            rows.append((*name, *NO_FIGURES, "only in B"))
        elif point["error"] or other["error"]:
            worse += bool(point["error"]) and not other["error"]
            which = " and ".join(side for side, p in (("A", other), ("B", point)) if p["error"])
            rows.append((*name, *NO_FIGURES, f"no figure in {which}"))
        else:
            verdicts = [_verdict(other, point, *figure, tolerance) for figure in FIGURES]
            verdict = "worse" if "worse" in verdicts else "better" if "better" in verdicts else "same"
            worse += verdict == "worse"
            values = [(other[figure], point[figure], point[figure] / other[figure]) for figure, _, _ in FIGURES]
            shown = [text for a, b, ratio in values for text in (f"{a:.3f}", f"{b:.3f}", f"{ratio:.2f}")]
            rows.append((*name, *shown, verdict))
    for point in points.values():
        rows.append((Cell(**point["cell"]).label, point["row"], *NO_FIGURES, "only in A"))
    return [*lines, *tables.markdown(HEAD, rows, "llrrrrrrl")], worse


def _key(point: dict[str, Any]) -> tuple[Any, ...]:
    return point["row"], *point["cell"].items()


def _verdict(a: dict[str, Any], b: dict[str, Any], figure: str, spread: str, less: bool, tolerance: float) -> str:
    ratio = b[figure] / a[figure] if less else a[figure] / b[figure]
    (low_a, high_a), (low_b, high_b) = a[spread], b[spread]
    if low_b <= high_a and low_a <= high_b:
        return "same"  # the repeats overlap: noise
    return "worse" if ratio > 1 + tolerance else "better" if ratio < 1 / (1 + tolerance) else "same"


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else changed between the files, so that a difference is not ascribed to the plugin alone."""
    found = [f"its {key}" for key in ("cpu", "cpus", "gpu", "python") if a["environment"][key] != b["environment"][key]]
    packages = [x["environment"]["packages"] for x in (a, b)]
    found += [f"{name} ({packages[0].get(name)}, {version})" for name, version in packages[1].items()
              if packages[0].get(name) != version]  # fmt: skip
    found += [f"the setting {key!r}" for key in ("model", "serve", "env", "output_tokens", "frame_size")
              if a["config"].get(key) != b["config"].get(key)]  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
