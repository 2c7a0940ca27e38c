# SPDX-License-Identifier: Apache-2.0
"""The vLLM versions that this package was written for. Imports nothing, so that ``evs-vllm doctor`` can."""

TESTED_VLLM = ((0, 32), (0, 33))
"""(major, minor) pairs. The CPU tests run 0.32. 0.33 has no CPU wheel: `make next` ran its Python code, no engine
did (CONTRIBUTING.md, "Add a vLLM version")."""


def tested_range() -> str:
    """The tested versions in words."""
    return ", ".join(f"{major}.{minor}.x" for major, minor in TESTED_VLLM)


def version_is_tested(version: str) -> bool:
    """Whether a version string such as "0.32.0+cpu" is in `TESTED_VLLM`."""
    return tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) in TESTED_VLLM
