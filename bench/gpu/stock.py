# SPDX-License-Identifier: Apache-2.0
"""Step "stock": step "engine" with vLLM's own pruning (``--video-pruning-rate``), without the plugin."""

from bench.gpu import engine
from bench.gpu.step import asked

if __name__ == "__main__":
    engine.main(asked(__doc__), stock=True)
