# SPDX-License-Identifier: Apache-2.0
"""Starts a vLLM server, asks it, and reads its counters: for the demo, live video, the benchmarks and the tests.

Needs the standard library only, so that whoever asks a server needs neither vLLM nor torch. Whatever is started here
ends with the block that started it.
"""

from evs_vllm.serving.processes import run_to_end, running, stoppable, tail
from evs_vllm.serving.requests import Answer, ask, chat, data_url, event_of, video_part
from evs_vllm.serving.routing import routing_key
from evs_vllm.serving.server import free_port, serving, starting, vllm_serve, wait_until_healthy
from evs_vllm.serving.status import healthy, is_local, metrics, parse_info, parse_metrics, read_url

__all__ = [
    "Answer",
    "ask",
    "chat",
    "data_url",
    "event_of",
    "free_port",
    "healthy",
    "is_local",
    "metrics",
    "parse_info",
    "parse_metrics",
    "read_url",
    "routing_key",
    "run_to_end",
    "running",
    "serving",
    "starting",
    "stoppable",
    "tail",
    "video_part",
    "vllm_serve",
    "wait_until_healthy",
]
