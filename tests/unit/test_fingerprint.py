# SPDX-License-Identifier: Apache-2.0
"""The fingerprint: equal for what keeps the same tokens, another for whatever could keep others."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evs_vllm
from evs_vllm import fingerprint
from evs_vllm.config import EVSConfig
from evs_vllm.fingerprint import ID, LOCAL_OPTIONS, differing
from evs_vllm.options import OPTIONS
from evs_vllm.serving import parse_info
from tests.unit.test_config import OTHER

BASE = EVSConfig(rate=0.5)


def test_weights_are_those_that_the_selection_reads():
    from evs_vllm.core import learned

    assert fingerprint.WEIGHTS == learned.WEIGHTS and fingerprint.WEIGHTS.is_file()


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_counts_but_those_of_the_machine(option):
    base = {} if option.name == "threshold" else {"rate": 0.5}
    other = EVSConfig.from_mapping({**base, option.name: OTHER[option.name]})
    same = fingerprint.fingerprint(other)[ID] == fingerprint.fingerprint(BASE)[ID]
    assert same == (option.name in LOCAL_OPTIONS)


def test_one_spelling_for_what_means_the_same():
    parts = fingerprint.fingerprint(EVSConfig(rate=0.50, min_tokens_per_unit=0))
    assert parts == fingerprint.fingerprint(BASE) and parts["rate"] == "1/2" and next(iter(parts)) == ID


def test_versions_count(monkeypatch):
    before = fingerprint.fingerprint(BASE)
    versions = {"vllm": "0.32.0+cpu", "transformers": "5.18.1", "torch": "2.13.1+cu130"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    parts = fingerprint.fingerprint(BASE)
    assert (parts["vllm"], parts["transformers"], parts["torch"]) == ("0.32.0", "5.18.1", "2.13")
    for package, version in (("vllm", "0.33.0"), ("transformers", "5.19"), ("torch", "2.14.0")):
        with monkeypatch.context() as patch:
            patch.setitem(versions, package, version)
            assert differing([parts, fingerprint.fingerprint(BASE)]) == [package]
    monkeypatch.setitem(versions, "torch", "2.13.0")
    assert fingerprint.fingerprint(BASE) == parts
    assert before["code"] == parts["code"]


def test_what_is_not_installed_is_not_compared(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    everything = fingerprint.fingerprint(BASE)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    here = fingerprint.installed_parts()
    assert here["vllm"] == here["torch"] == here["transformers"] == ""
    assert differing([here, everything]) == []
    assert differing([here, {**everything, "weights": "other"}, everything]) == ["weights"]


@pytest.fixture
def fresh():
    yield fingerprint._digest_of_code.cache_clear()
    fingerprint._digest_of_code.cache_clear()


def test_code_and_weights_count(tmp_path: Path, monkeypatch, fresh):
    """On a copy of the package, of which one byte is changed at a time."""
    root = tmp_path / "evs_vllm"
    shutil.copytree(Path(evs_vllm.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__", "model"))
    before = fingerprint.installed_parts()

    class Spec:
        origin = str(root / "__init__.py")

    def code():
        fingerprint._digest_of_code.cache_clear()
        return fingerprint.installed_parts()["code"]

    find = fingerprint.importlib.util.find_spec
    monkeypatch.setattr(fingerprint.importlib.util, "find_spec", lambda n: Spec if n == "evs_vllm" else find(n))
    assert code() == before["code"]
    file = root / "core" / "plan.py"
    file.write_bytes(file.read_bytes() + b"\n")
    assert code() != before["code"]

    weights = tmp_path / "learned.npz"
    weights.write_bytes(fingerprint.WEIGHTS.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(fingerprint, "WEIGHTS", weights)
    assert fingerprint.installed_parts()["weights"] != before["weights"]


SHOW = """
import json, sys
from evs_vllm.engine.metrics import show_fingerprint
for parts in json.loads(sys.argv[1]):
    show_fingerprint(parts)
"""


@pytest.mark.parametrize(
    ("engines_of_processes", "shown"),
    [([["1/2"], ["1/2"]], ["1/2"]), ([["1/2"], ["3/4"]], ["1/2", "3/4"]), ([["1/2", "3/4"], ["3/4"]], ["3/4"])],
    ids=["two that agree", "two that differ", "one had another engine before"],
)
def test_processes_of_one_server_share_the_metric(tmp_path, engines_of_processes, shown):
    """As several API servers do: each writes its own file, and whoever is asked adds them up."""
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess

    for rates in engines_of_processes:
        parts = json.dumps([{"fingerprint": rate, "rate": rate} for rate in rates])
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        # One after the other, as the most recent value counts.
        subprocess.run([sys.executable, "-c", SHOW, parts], env=env, check=True, timeout=120)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    found = parse_info(generate_latest(registry).decode(), fingerprint.METRIC)
    assert sorted(parts["rate"] for parts in found) == shown
