# SPDX-License-Identifier: Apache-2.0
"""Stands in for ``vllm serve``: health, metrics, and a streamed answer, within a second. It also leaves a child behind.

Copied to ``vllm/entrypoints/cli/main.py`` of a folder on PYTHONPATH. EVS_FAKE: "die" ends it at once with a word in
the log, "stall" keeps it unhealthy, "refuse" answers 400.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = os.environ.get("EVS_FAKE", "")
WITH_EVS = "--evs-rate" in sys.argv
clips = 0


class Handler(BaseHTTPRequestHandler):
    def send(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/metrics":
            names = ("evs:video_tokens_total", "evs:video_tokens_kept_total") if WITH_EVS else ()
            return self.send(200, "".join(f"{n} {float(c * clips)}\n" for n, c in zip(names, (400, 100))))
        return self.send(503 if MODE == "stall" else 200, "")

    def do_POST(self):
        global clips
        clips += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
        if MODE == "refuse":
            return self.send(400, json.dumps({"error": {"message": "too long"}}))
        time.sleep(0.05 if WITH_EVS else 0.2)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta in ({"role": "assistant", "content": ""}, {"content": "a"}, {"content": " bike"}):
            self.event({"choices": [{"index": 0, "delta": delta}]})
        usage = {"prompt_tokens": 120 if WITH_EVS else 420, "completion_tokens": 2, "total_tokens": 422}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk):
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "x"} | chunk
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *args):
        pass


print(f"arguments {sys.argv[1:]}", flush=True)
if MODE == "die":
    sys.exit("no memory for this model")
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
address = (sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1]))
ThreadingHTTPServer(address, Handler).serve_forever()
