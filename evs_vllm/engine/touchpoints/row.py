# SPDX-License-Identifier: Apache-2.0
"""A row of the ledger, and the comparison of a row with what is installed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from evs_vllm.engine.touchpoints.source import find

MODELS = "vllm.model_executor.models."

PUBLIC = "Stays: it is vLLM's interface for others."
PROCESSORS = "vLLM lets a plugin change a processor's placeholders, fields and cache keys."
TOWERS = "vLLM's towers take row orders and sequence boundaries of any queries and keys by a documented call."


@dataclass(frozen=True, kw_only=True)
class Touchpoint:
    """One thing that this package builds on.

    Attributes:
        what: What is done with it, and by which of our functions.
        where: "module:Qualified.name", or a module.
        parameters: All parameters of the function, because we wrap it, override it or stand in for it.
        accepts: Parameters of the function that we pass, among others.
        results: How many values the function returns together, or 0 for what has not to be compared.
        attributes: Names in the module, or of the class and its instances.
        source: What its source says: facts that are in no signature.
        why: What needs it, so what breaks without it.
        gone_when: When the row can go.
    """

    what: str
    where: str
    parameters: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    results: int = 0
    attributes: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    why: str
    gone_when: str


def parts(*, what: str, attributes: Mapping[str, tuple[str, ...]], why: str, gone_when: str) -> tuple[Touchpoint, ...]:
    """Rows that differ only in where they look, and for which attributes."""
    return tuple(
        Touchpoint(what=what, where=where, attributes=names, why=why, gone_when=gone_when)
        for where, names in attributes.items()
    )


class Finding(NamedTuple):
    """What the installed packages make of a touchpoint.

    Attributes:
        verdict: "ok"; "gone", of the function, class, module or a name in it; "changed signature", also of what a
            function returns; or "changed source", of a fact that is in no signature.
        text: What is not as it was, or "".
    """

    verdict: str
    text: str = ""


def judge(touchpoint: Touchpoint) -> Finding:
    """Compares a touchpoint with the installed packages."""
    found, where = find(touchpoint.where), touchpoint.where
    if found is None:
        return Finding("gone", f"{where} is gone")
    parameters = found.parameters() or ()
    if touchpoint.parameters and touchpoint.parameters != parameters:
        taken, expected = ", ".join(parameters), ", ".join(touchpoint.parameters)
        return Finding("changed signature", f"{where} takes ({taken}), not ({expected})")
    if lost := [name for name in touchpoint.accepts if name not in parameters]:
        return Finding("changed signature", f"{where} does not take {', '.join(lost)}")
    if touchpoint.results and found.results() != {touchpoint.results}:
        return Finding("changed signature", f"{where} does not return {touchpoint.results} values")
    if touchpoint.attributes and (lost := sorted(set(touchpoint.attributes) - found.attributes())):
        return Finding("gone", f"{where} has no {', '.join(lost)}")
    if touchpoint.source and (lost := [text for text in touchpoint.source if text not in found.source()]):
        return Finding("changed source", f"{where} no longer says {', '.join(map(repr, lost))}")
    return Finding("ok")


def missing(touchpoint: Touchpoint) -> str:
    """What the installed packages lack of a touchpoint, or ""."""
    return judge(touchpoint).text
