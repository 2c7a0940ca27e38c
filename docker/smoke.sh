#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Does this installation serve, and does it prune? Starts a server with --evs-rate, waits for /health, sends one clip
# twice (pruned, and with the request's own rate 0), compares the prompt tokens and stops the server.
#
#   docker run --gpus all --ipc=host --entrypoint evs-smoke evs-vllm [MODEL]
#   PATH="$PWD/.venv/bin:$PATH" docker/smoke.sh [MODEL]                       # without a container
#
# Without MODEL it makes a tiny random one, so it needs neither a download nor a large GPU. Counting tokens is the
# point: a server that ignores the plugin answers just as politely.
# Run by the authors without a container, on a CPU. NOT RUN inside the images: no container engine there.
set -euo pipefail

rate=0.75
timeout_s="${SMOKE_TIMEOUT_S:-600}"
work="$(mktemp -d)"
server=""

finish() {
    code=$?
    if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
        kill "$server" 2>/dev/null || true
        for _ in $(seq 30); do kill -0 "$server" 2>/dev/null || break; sleep 1; done
        kill -9 "$server" 2>/dev/null || true
    fi
    [ "$code" = 0 ] || { [ -f "$work/log" ] && tail -n 40 "$work/log" >&2; echo "smoke: FAILED" >&2; }
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT

if [ $# -ge 1 ]; then
    model="$1"
else
    model="$work/model"
    python3 -c "import sys; from evs_vllm.testing import make_model; make_model(sys.argv[1], 'qwen2_5_vl')" "$model"
fi

port="$(python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")"
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
vllm serve "$model" --host 127.0.0.1 --port "$port" --served-model-name smoke --enforce-eager --max-model-len 2048 \
    --max-num-seqs 2 --evs-rate "$rate" --evs-request-overrides any >"$work/log" 2>&1 </dev/null &
server=$!

PORT="$port" SERVER="$server" RATE="$rate" TIMEOUT_S="$timeout_s" python3 - <<'PYTHON'
import base64
import io
import json
import os
import sys
import time
import urllib.request

import numpy as np
from PIL import Image

base = f"http://127.0.0.1:{os.environ['PORT']}"
start = time.monotonic()
while True:
    try:
        urllib.request.urlopen(f"{base}/health", timeout=5)
        break
    except OSError as error:
        try:
            os.kill(int(os.environ["SERVER"]), 0)
        except ProcessLookupError:
            sys.exit("smoke: the server died before it was healthy")
        if time.monotonic() - start > float(os.environ["TIMEOUT_S"]):
            sys.exit(f"smoke: not healthy in time ({error})")
        time.sleep(1)
print(f"smoke: healthy after {time.monotonic() - start:.0f} s")

# A still picture with a square that moves over it, as the JPEG frames vLLM takes for a video.
picture = np.random.default_rng(0).integers(0, 256, (112, 140, 3), dtype=np.uint8)
frames = []
for index in range(8):
    frame = picture.copy()
    frame[40:64, 8 * index : 8 * index + 24] = 255
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    frames.append(base64.b64encode(file.getvalue()).decode())
video = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}


def prompt_tokens(**more):
    body = {
        "model": "smoke",
        "messages": [{"role": "user", "content": [video, {"type": "text", "text": "What moves?"}]}],
        "max_tokens": 4,
        "temperature": 0,
        **more,
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    assert answer["usage"]["completion_tokens"] > 0, answer
    return answer["usage"]["prompt_tokens"]


pruned, whole = prompt_tokens(), prompt_tokens(mm_processor_kwargs={"evs_rate": 0})
print(f"smoke: {pruned} prompt tokens at rate {os.environ['RATE']}, {whole} unpruned")
if pruned >= whole:
    sys.exit("smoke: nothing was pruned: is evs-vllm installed where vLLM runs, and VLLM_PLUGINS unset?")
PYTHON
echo "smoke: ok"
