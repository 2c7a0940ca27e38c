# SPDX-License-Identifier: Apache-2.0
"""What the benchmark puts into some of its own servers. Never part of the plugin, and never in a server it times
against vanilla vLLM, but for `stock_flag`, which the row "stock" cannot run without on a CPU.

Two vLLM plugins, chosen with ``VLLM_PLUGINS``; `servers.py` announces them to vLLM.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

STAGES_FILE = "EVS_BENCH_STAGES"
"""Environment variable: the file that `stage_times` appends to, one JSON object a line."""


def stock_flag() -> None:
    """Lets ``--video-pruning-rate`` run on vLLM's CPU engine.

    `CPUModelRunner.load_model` of vLLM 0.32 leaves `is_multimodal_pruning_enabled` at False, whereas the GPU runner
    sets it from the model and the configuration. The model appends its position channels all the same, and the first
    clip ends the engine. This sets the flag as the GPU runner does and changes nothing else.
    """
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.load_model

    @functools.wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        settings = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(self.get_model())
            and settings is not None
            and settings.is_multimodal_pruning_enabled()
        )

    CPUModelRunner.load_model = load_model


def stage_times() -> None:
    """Writes down how long each stage of a request takes, in whichever of vLLM's processes it runs.

    vLLM 0.32 has such times (``--enable-mm-processor-stats``) but gives them to in-process callers only, and none for
    decoding, transport and positions.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.multimodal.media.video import VideoMediaIO
    from vllm.multimodal.processing.context import TimingContext
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _time(VideoMediaIO, "load_base64", "decode")
    _time(BaseRenderer, "_process_multimodal", "processor")
    _time(MsgpackEncoder, "encode", "transport")
    _time(MsgpackDecoder, "decode", "transport")
    _time(MessageQueue, "enqueue", "transport")
    _time(GPUModelRunner, "_init_mrope_positions", "positions")
    _time(GPUModelRunner, "_execute_mm_encoder", "tower", device=True)
    _time(GPUModelRunner, "execute_model", "step", device=True)

    @contextlib.contextmanager
    def record(self: Any, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            _write(stage, time.perf_counter() - started)

    TimingContext.record = record


def _time(owner: type, method: str, stage: str, device: bool = False) -> None:
    stock: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(stock)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if device:
            _synchronize()
        started = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            if device:
                _synchronize()
            _write(stage, time.perf_counter() - started)

    setattr(owner, method, timed)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write(stage: str, seconds: float) -> None:
    if seconds < 1e-5 or not (path := os.environ.get(STAGES_FILE)):
        return
    # One short write in append mode: lines of several processes do not mix.
    line = json.dumps({"stage": stage, "seconds": seconds}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
