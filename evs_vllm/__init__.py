# SPDX-License-Identifier: Apache-2.0
"""Efficient Video Sampling for vLLM: drops the video tokens that do not change."""

__version__ = "0.2.0.dev0"
