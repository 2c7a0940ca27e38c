# SPDX-License-Identifier: Apache-2.0
"""The demo: one video on servers without and with EVS (`compare`), and the answers of a trained model (`answers`).

``evs-vllm demo`` is the command. Importing this needs no more than evs_vllm itself; what else it needs is in the extra
``demo``.
"""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evs_vllm.errors import EVSError
from evs_vllm.serving import serving, vllm_serve

INSTALL = 'pip install "evs-vllm[demo]"'


@dataclass(frozen=True)
class Launcher:
    """How the demo starts its servers.

    Attributes:
        logs: The folder for their logs.
        timeout_s: How long each may take to start.
    """

    logs: Path
    timeout_s: float

    @contextlib.contextmanager
    def serve(self, name: str, arguments: Sequence[str]) -> Iterator[str]:
        """The URL of ``vllm serve`` with `arguments`, alive as long as the block; `name` is that of its log."""
        log = self.logs / f"{name}.log"
        with serving(vllm_serve(arguments), log, environment(), self.timeout_s, _progress()) as url:
            yield url


def environment() -> Mapping[str, str]:
    """The environment of what the demo starts; the caller's own wins."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}  # GiB; nothing leaves this machine
    return defaults | dict(os.environ)


def say(text: str) -> None:
    """Prints a line now: servers take long to start."""
    print(text, flush=True)


def check_installed(*packages: str) -> None:
    """Refuses to begin without what is needed later.

    Raises:
        EVSError: One of `packages` (names of distributions) is not installed.
    """
    for package in packages:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            raise EVSError(f"the demo needs {package}, which is not installed: {INSTALL}") from None


def _progress() -> Callable[[float], None]:
    """Shows that a server is still starting: a running count on a terminal, elsewhere a line every half minute."""
    shown = 0.0

    def show(waited: float) -> None:
        nonlocal shown
        if sys.stdout.isatty():
            print(f"\r          starting, {waited:.0f} s\r", end="", flush=True)
        elif waited - shown >= 30:
            shown = waited
            say(f"          starting, {waited:.0f} s")

    return show
