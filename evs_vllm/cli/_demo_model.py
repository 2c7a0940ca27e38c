# SPDX-License-Identifier: Apache-2.0
"""The demo's model: random weights, small, but with the vision to language cost ratio of Qwen2.5-VL-7B."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from evs_vllm import __version__

FAMILY = "qwen2_5_vl"
# The released 7B model has 0.67 G parameters in the vision tower, which sees 4 patches for each token that its 6.5 G
# parameters of decoder layers see; here it is 8.8 M and 80 M.
SIZES = {
    "hidden_size": 768,
    "layers": 16,
    "heads": 12,
    "kv_heads": 4,
    "vision_hidden": 384,
    "vision_layers": 6,
    "max_tokens_per_frame": 230,
}


def demo_model(say: Callable[[str], None]) -> Path:
    """The folder of the demo's model, made on first use and kept in the temporary directory.

    Args:
        say: Called with a line that says what happens.
    """
    key = hashlib.sha256(json.dumps([__version__, FAMILY, SIZES]).encode()).hexdigest()[:10]
    folder = Path(tempfile.gettempdir()) / f"evs-vllm-demo-{os.getuid()}" / f"{FAMILY}-{key}"
    if folder.is_dir():
        say(f"model     {folder}")
        return folder
    say(f"model     making a small {FAMILY} with random weights in {folder}")
    from transformers.utils import logging

    from evs_vllm.testing import make_model

    logging.disable_progress_bar()
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    # Made aside and moved: what an interrupted run leaves is not taken for a model.
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        make_model(unfinished, FAMILY, **SIZES)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
