# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM. vllm is imported under this folder only.

The entry point that vLLM loads is `evs_vllm.engine.plugin:register`.
"""
