# SPDX-License-Identifier: Apache-2.0
"""Environment variables of evs-vllm, read when asked for, never at import.

| variable | type | default | meaning |
|---|---|---|---|
| ``EVS_ALLOW_UNTESTED_VLLM`` | bool | 0 | start although the vLLM version is outside the tested range |
| ``EVS_KERNELS_BACKEND`` | auto, ref, cpu, triton | auto | kernel implementation (read by ``evs_kernels``) |
"""

import os


def allow_untested_vllm() -> bool:
    """Whether ``EVS_ALLOW_UNTESTED_VLLM`` is set to something other than 0, false or nothing."""
    return os.environ.get("EVS_ALLOW_UNTESTED_VLLM", "0").strip().lower() not in ("", "0", "false", "no")
