# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm doctor --server``: whether servers, and this installation, are of one kind. Standard library only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evs_vllm.fingerprint import ID, METRIC, differing, installed_parts
from evs_vllm.serving import parse_info, read_url
from evs_vllm.text import table

TIMEOUT_S = 10.0
"""How long a server may say nothing."""

HERE = "here"


@dataclass
class Fleet:
    """What was found.

    Attributes:
        parts: The fingerprints by who has them: `HERE` and the servers; a server whose processes disagree has several,
            which are numbered.
        problems: What is wrong, one sentence each; empty where all agree.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine(urls: Sequence[str]) -> Fleet:
    """Asks the servers at `urls` for their fingerprints and compares them, also with what is installed here."""
    fleet = Fleet({HERE: installed_parts()})
    for url in dict.fromkeys(map(base_url, urls)):
        try:
            found = parse_info(read_url(f"{url}/metrics", timeout_s=TIMEOUT_S), METRIC)
        except (OSError, ValueError) as error:  # a ValueError of what is no URL, or no text
            fleet.problems.append(f"{url} shows no metrics: {' '.join(str(error).split())}.")
            continue
        if not found:
            fleet.problems.append(
                f"{url} shows no {METRIC}: EVS is off there, not installed, or older than its fingerprint. It prunes "
                "nothing, or by rules that cannot be compared."
            )
        elif len(found) > 1:
            fleet.problems.append(
                f"{url} has processes of {len(found)} kinds: what a request is served by depends on which one takes it."
            )
        for number, parts in enumerate(found, 1):
            fleet.parts[url if len(found) == 1 else f"{url} ({number})"] = parts
    if names := differing(list(fleet.parts.values())):
        fleet.problems.append(f"NOT THE SAME EVERYWHERE: {', '.join(names)}. {_way_out(names)}")
    return fleet


def base_url(url: str) -> str:
    """The server's URL as `read_url` takes it: with a scheme, without ``/v1`` or ``/metrics``."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1").rstrip("/")


def _way_out(names: Sequence[str]) -> str:
    installed = [name for name in names if name in installed_parts()]
    ways = []
    if installed:
        ways.append("install the same versions on all machines")
    if len(installed) < len(names):
        ways.append("start all servers with the same --evs-* options")
    return f"The same clip may keep other tokens there; {' and '.join(ways)}."


def lines(fleet: Fleet) -> list[str]:
    """The fleet for a person: a row for each part, a column for each of those that have them."""
    names = dict.fromkeys([ID, *(name for parts in fleet.parts.values() for name in parts)])
    different = set(differing(list(fleet.parts.values())))
    rows = [("", *(who.removeprefix("http://") for who in fleet.parts), "")]
    for name in names:
        values = (parts.get(name, "") or "-" for parts in fleet.parts.values())
        rows.append((name, *values, "<- differs" if name in different else ""))
    verdict = [f"!! {problem}" for problem in fleet.problems]
    return [*table(rows), "", *(verdict or ["The servers and this installation agree."])]


def as_json(fleet: Fleet) -> str:
    different = differing(list(fleet.parts.values()))
    report: dict[str, Any] = {"parts": fleet.parts, "differing": different, "problems": fleet.problems}
    return json.dumps(report, indent=2)
