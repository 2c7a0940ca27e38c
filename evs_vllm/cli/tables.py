# SPDX-License-Identifier: Apache-2.0
"""The tables of the documentation, from the tables of the code.

``python -m evs_vllm.cli.tables README.md docs/*.md`` rewrites them where they stand, between two comments.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from evs_vllm.config import EVSConfig
from evs_vllm.families import FAMILIES
from evs_vllm.families.refused import REFUSED
from evs_vllm.options import OPTIONS
from evs_vllm.serving.topologies import STATES, TOPOLOGIES


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def options() -> str:
    """Every option: flag, request key, allowed values, default, meaning."""
    defaults = EVSConfig().to_mapping()
    rows = [
        (
            f"`{option.flag}`",
            f"`{option.request_key}`" if option.per_request else "",
            option.allowed,
            "" if defaults[option.name] is None else f"`{defaults[option.name]}`",
            option.help,
        )
        for option in OPTIONS
    ]
    return markdown(("flag", "per request", "allowed", "default", "meaning"), rows)


def family_rows(architecture: str = "{}") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and one row per supported family; `architecture` is the format of an architecture's name."""
    head: tuple[str, ...] = (
        "family",
        "architectures",
        "positions",
        "clip in the prompt",
        "encoder reuse",
        "causal budget",
        "compared with",
        "limits",
    )
    rows: list[tuple[str, ...]] = [
        (
            family.name,
            ", ".join(architecture.format(name) for name in family.architectures),
            family.positions,
            family.layout,
            "yes" if family.reuse else "no",
            "yes" if family.grows else "no",
            family.proof,
            family.limits,
        )
        for family in FAMILIES
    ]
    return (head, rows) if any(row[-1] for row in rows) else (head[:-1], [row[:-1] for row in rows])


def families() -> str:
    """Every supported family."""
    return markdown(*family_rows("`{}`"))


def family_names() -> str:
    """The names of the supported families, as one sentence."""
    *names, last = (family.name for family in FAMILIES)
    return f"Supported: {', '.join(names)} and {last}."


def refused_rows(architecture: str = "{}") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and one row per family that is refused; `architecture` is the format of an architecture's name."""
    rows: list[tuple[str, ...]] = [
        (
            row.name,
            ", ".join(architecture.format(name) for name in row.architectures),
            "not yet" if row.fits else "does not fit",
            row.reason,
        )
        for row in REFUSED
    ]
    return ("refused", "architectures", "", "why"), rows


def refused() -> str:
    """Every family that is refused, and why."""
    return markdown(*refused_rows("`{}`"))


def topologies() -> str:
    """Every way to deploy, and what was done with it."""
    rows = [(row.title, row.how, STATES[row.state], row.notes) for row in TOPOLOGIES]
    return markdown(("topology", "how", "state", "what to know"), rows)


TABLES = {
    "options": options,
    "family_names": family_names,
    "families": families,
    "refused": refused,
    "topologies": topologies,
}
"""What stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""


def rewrite(text: str) -> str:
    """`text` with each table between ``<!-- name:begin -->`` and ``<!-- name:end -->`` brought up to date."""
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        content = table()
        text = mark.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewrite(path.read_text()))
