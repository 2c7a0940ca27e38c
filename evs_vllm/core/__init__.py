# SPDX-License-Identifier: Apache-2.0
"""What EVS is, whatever runs it: a clip's pixels, which tokens stay, the plan, and what is read off it.

Knows neither vLLM nor transformers nor any model family.
"""
